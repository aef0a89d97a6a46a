"""Rows of very different difficulty: a heavy-tailed share of each row's tokens is random."""

from __future__ import annotations

from random import Random

from finitune.bench.controls._rows import rows_in, shuffled, train_on
from finitune.bench.workload import Workload

RUNS = (("llama_sft", "fp32"), ("internlm2_sft", "fp32"), ("llama_sft", "fp16"))
STEPS = 1500


def plant(load: Workload, random: Random) -> str:
    """The share is a Pareto draw, cut at 1."""
    alpha = random.uniform(0.8, 2.0)
    rows = [shuffled(random, r, min(1.0, 0.02 * random.paretovariate(alpha))) for r in rows_in(load).values()]
    train_on(load, rows, random.randrange(1000))
    return f"random tokens in every row, their share Pareto with alpha {alpha:.2f}"
