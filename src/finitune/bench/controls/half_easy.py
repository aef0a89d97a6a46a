"""Two kinds of rows: half are all one token, half are noise; the loss of a step depends on the mixture."""

from __future__ import annotations

from random import Random

import torch

from finitune.bench.controls._rows import noise, rows_in, train_on
from finitune.bench.workload import Workload

RUNS = (("llama_sft", "fp32"), ("internlm2_sft", "fp32"))
STEPS = 1500


def plant(load: Workload, random: Random) -> str:
    """Two rows a step, so that all mixtures come up."""
    rows = list(rows_in(load).values())
    for place, row in enumerate(rows):
        rows[place] = torch.full_like(row, int(row[0])) if place % 2 else noise(random, len(row))
    train_on(load, rows, random.randrange(1000), per_batch=2)
    return "rows of one token and rows of noise, two a step"
