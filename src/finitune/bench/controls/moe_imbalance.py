"""A mixture of experts whose data favour some tokens, so that some experts get more of them, within bounds."""

from __future__ import annotations

from random import Random

from finitune.bench.controls._rows import rows_in, train_on
from finitune.bench.workload import Workload

RUNS = (("mixtral", "fp32"), ("mixtral", "bf16"))
STEPS = 400


def plant(load: Workload, random: Random) -> str:
    """A third of the rows comes three times as often."""
    rows = list(rows_in(load).values())
    favoured = random.sample(rows, len(rows) // 3)
    train_on(load, [*rows, *favoured, *favoured], random.randrange(1000))
    return f"{len(favoured)} of {len(rows)} rows come three times as often"
