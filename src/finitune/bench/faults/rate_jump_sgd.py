"""I: from a step on the learning rate of SGD is far too high.

What happens in the field: a rate meant for Adam's normalised steps, or for another batch size. Clipping bounds the
step to the rate itself; the loss is huge and finite, then that of guessing. Threads: haotian-liu/LLaVA#1375,
paiml/aprender#2258.
"""

from __future__ import annotations

from random import Random

from finitune.bench.faults import _draw
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "I"
CASES = ()
RUNS = (("pretrained_sgd", "fp32"), ("pretrained_sgd", "bf16"))


def plant(load: Workload, random: Random) -> Expected:
    """The rate is multiplied by 100 to 10,000 at a drawn update and stays so."""
    step, _ = load.place(random)
    factor = _draw.log_uniform(random, 1e2, 1e4)
    load.rate = lambda updates: factor if updates >= step - 1 else 1.0
    return Expected(
        says=f"the learning rate of SGD is {_draw.spelled(factor)} times as high from step {step} on",
        step=step,
        codes=("OPT401",),
        remedies=("lower_lr",),
        never=("DAT", "NUM4", "SYS", "MOD"),
        data={"step": step, "factor": factor},
    )
