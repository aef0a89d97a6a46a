"""The data change on purpose: easy rows for some hundred steps, then harder ones."""

from __future__ import annotations

from random import Random

from finitune.bench.controls._rows import rows_in, shuffled, train_on
from finitune.bench.workload import Workload

RUNS = (("llama_sft", "fp32"), ("internlm2_sft", "fp32"))
STEPS = 1000


def plant(load: Workload, random: Random) -> str:
    """From a step on, a quarter to a half of all tokens is random."""
    change, share = random.randint(300, 600), random.uniform(0.25, 0.5)
    early, names = list(load.batches[:change]), list(load.rows[:change])
    rows = [shuffled(random, row, share) for row in rows_in(load).values()]
    train_on(load, rows, random.randrange(1000))
    load.batches[:change], load.rows[:change] = early, names
    load.rows[change:] = [[n.replace("rows", "harder") for n in step] for step in load.rows[change:]]
    return f"from step {change + 1} on {100 * share:.0f} % of the tokens are random"
