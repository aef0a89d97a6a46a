"""No gradient clipping, and a few hard rows."""

from __future__ import annotations

from random import Random

from finitune.bench.controls._rows import rows_in, shuffled, train_on
from finitune.bench.workload import Workload

RUNS = (("llama_sft", "fp32"), ("internlm2_sft", "fp32"))
STEPS = 1000


def plant(load: Workload, random: Random) -> str:
    """A tenth of the rows has a third of random tokens."""
    load.max_grad_norm = None
    rows = list(rows_in(load).values())
    rows = [shuffled(random, r, 1 / 3) if i % 10 == 0 else r for i, r in enumerate(rows)]
    train_on(load, rows, random.randrange(1000))
    return "gradients are not clipped; every tenth row is hard"
