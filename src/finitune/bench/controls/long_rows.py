"""One row in twenty is six to ten times as long as the others."""

from __future__ import annotations

from random import Random

import torch

from finitune.bench.controls._rows import rows_in, train_on
from finitune.bench.workload import Workload

RUNS = (("llama_sft", "fp32"), ("internlm2_sft", "bf16"))
STEPS = 500


def plant(load: Workload, random: Random) -> str:
    """Long rows are others put together."""
    rows = list(rows_in(load).values())
    for place in random.sample(range(len(rows)), len(rows) // 20):
        rows[place] = torch.cat([random.choice(rows) for _ in range(random.randint(6, 10))])[:180]
    train_on(load, rows, random.randrange(1000))
    return f"{len(rows) // 20} long rows of {len(rows)}"
