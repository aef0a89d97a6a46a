"""Q: a row of a router becomes NaN.

What happens in the field: every expert's probability is NaN, the choice of experts is arbitrary, and loss and balance
loss are NaN; on many devices a flooded expert ends in running out of memory.
Threads: NVIDIA-NeMo/Automodel#2687, NVIDIA-NeMo/Automodel#1408.
"""

from __future__ import annotations

import math
from random import Random

from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "Q"
CASES = ()
RUNS = (("mixtral", "fp32"), ("mixtral", "bf16"), ("mixtral", "fp16"))


def plant(load: Workload, random: Random) -> Expected:
    """One expert's row of the gate, or one element of it, becomes NaN or inf between two steps."""
    step, _ = load.place(random)
    name = f"{random.choice(load.layers)}.mlp.gate.weight"
    weight = load.parameter(name).data
    expert, value = random.randrange(weight.shape[0]), random.choice((math.nan, math.inf))
    where = random.choice((slice(None), random.randrange(weight.shape[1])))

    def spoil() -> None:
        weight[expert, where] = value

    load.between(step, spoil)
    return Expected(
        says=f"{name}[{expert}] becomes {value} after step {step}",
        step=step + 1,
        codes=("SYS403", "MOD403"),
        places=(("parameter", name), ("module", name.removesuffix(".weight"))),
        remedies=("repair_tensor", "roll_back", "retry"),
        never=("DAT", "OPT", "NUM4"),
        data={"step": step, "parameter": name, "expert": expert, "value": str(value)},
    )
