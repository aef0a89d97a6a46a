"""A few rows of pure noise among rows that are learnt: their batches have a high loss every epoch, and all recovers."""

from __future__ import annotations

from random import Random

from finitune.bench.controls._rows import noise, rows_in, train_on
from finitune.bench.workload import Workload

RUNS = (("llama_sft", "fp32"), ("internlm2_sft", "fp32"), ("llama_sft", "bf16"))
STEPS = 1500


def plant(load: Workload, random: Random) -> str:
    """One to four rows of 120 are noise."""
    rows, count = list(rows_in(load).values()), random.randint(1, 4)
    for place in random.sample(range(len(rows)), count):
        rows[place] = noise(random, len(rows[place]))
    train_on(load, rows, random.randrange(1000))
    return f"{count} of {len(rows)} rows are noise"
