"""One row a step: loss and gradient norm jump about."""

from __future__ import annotations

from random import Random

from finitune.bench.controls._rows import rows_in, train_on
from finitune.bench.workload import Workload

RUNS = (("llama_sft", "fp32"), ("internlm2_sft", "fp32"), ("llama_sft", "bf16"))
STEPS = 1500


def plant(load: Workload, random: Random) -> str:
    """Batches of one."""
    train_on(load, list(rows_in(load).values()), random.randrange(1000), per_batch=1)
    return "batches of one row"
