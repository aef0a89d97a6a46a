"""A cosine with warm restarts: the learning rate jumps up again several times, tenfold and more."""

from __future__ import annotations

import math
from random import Random

from finitune.bench.workload import Workload

RUNS = (("llama_sft", "fp32"), ("internlm2_sft", "fp32"))
STEPS = 1000


def plant(load: Workload, random: Random) -> str:
    """Every period ends at a fiftieth of the rate."""
    period = random.randint(100, 300)
    load.rate = lambda updates: 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (updates % period) / period))
    return f"a restart every {period} steps"
