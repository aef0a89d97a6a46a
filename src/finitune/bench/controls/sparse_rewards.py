"""A policy gradient with rewards of 0 and 1: in many steps all answers get the same, and no gradient comes of it."""

from __future__ import annotations

from random import Random

from finitune.bench.runs.roll_outs import rewards
from finitune.bench.workload import Workload

RUNS = (("roll_outs", "fp32"), ("roll_outs", "bf16"))
STEPS = 160


def plant(load: Workload, random: Random) -> str:
    """An answer is worth something only where a good part of it is right."""
    least = random.uniform(0.4, 0.7)
    for batch in load.batches:
        batch["least"].fill_(least)
        batch["rewards"] = rewards(batch)
    return f"reward 1 for an answer of which {100 * least:.0f} % is right, 0 for any other"
