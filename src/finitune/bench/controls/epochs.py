"""Few rows, very many epochs: the loss falls at every boundary and comes close to zero."""

from __future__ import annotations

from random import Random

from finitune.bench.controls._rows import rows_in, train_on
from finitune.bench.workload import Workload

RUNS = (("llama_sft", "fp32"), ("internlm2_sft", "fp32"))
STEPS = 1500


def plant(load: Workload, random: Random) -> str:
    """Eight to twenty-four rows."""
    count = random.randint(8, 24)
    train_on(load, list(rows_in(load).values())[:count], random.randrange(1000))
    return f"{count} rows over and over"
