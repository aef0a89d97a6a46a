"""Q: a weight of one expert becomes infinite; only tokens that are sent to it fail.

What happens in the field: as with any weight, but it hides: with many experts most batches are fine, and the one that
fails looks like bad data. Threads: NVIDIA-NeMo/Automodel#2687, unslothai/unsloth-zoo#866.
"""

from __future__ import annotations

import math
from random import Random

from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "Q"
CASES = ()
RUNS = (("mixtral", "fp32"), ("mixtral", "bf16"), ("mixtral", "fp16"))


def plant(load: Workload, random: Random) -> Expected:
    """One element of an expert's projections becomes inf, -inf or NaN between two steps."""
    step, _ = load.place(random)
    name = f"{random.choice(load.layers)}.mlp.experts.{random.choice(('gate_up_proj', 'down_proj'))}"
    weight = load.parameter(name).data
    index, value = random.randrange(weight.numel()), random.choice((math.inf, -math.inf, math.nan))
    expert = index // weight[0].numel()

    def spoil() -> None:
        weight.view(-1)[index] = value

    load.between(step, spoil)
    return Expected(
        says=f"{name}[{index}] of expert {expert} becomes {value} after step {step}",
        step=step + 1,
        codes=("SYS403",),
        places=(("parameter", name),),
        remedies=("repair_tensor", "roll_back", "retry"),
        never=("DAT", "OPT", "NUM4"),
        data={"step": step, "parameter": name, "index": index, "expert": expert, "value": str(value)},
    )
