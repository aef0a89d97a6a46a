"""I: from a step on the learning rate is 100 to 100,000 times too high.

What happens in the field: a schedule that restarts, a unit mistaken, an argument with a zero too few. The loss is
finite, far above where it began, and ends near that of guessing; no number is NaN.
Threads: haotian-liu/LLaVA#1375, paiml/aprender#2258.
"""

from __future__ import annotations

from random import Random

from finitune.bench.faults import _draw
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "I"
CASES = (21,)
RUNS = (("pretrained_sft", "fp32"), ("pretrained_sft", "bf16"), ("lora", "fp32"))


def plant(load: Workload, random: Random) -> Expected:
    """AdamW's rate is multiplied at a drawn update and stays so."""
    step, _ = load.place(random)
    factor = _draw.log_uniform(random, 1e2, 1e5)
    load.rate = lambda updates: factor if updates >= step - 1 else 1.0
    return Expected(
        says=f"the learning rate is {_draw.spelled(factor)} times as high from step {step} on",
        step=step,
        codes=("OPT401",),
        remedies=("lower_lr",),
        never=("DAT", "NUM4", "SYS", "MOD"),
        data={"step": step, "factor": factor},
    )
