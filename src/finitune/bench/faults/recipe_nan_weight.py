"""T: one weight becomes NaN or infinite between two steps of a run from a recipe.

What happens in the field: a device that computes wrongly now and then, or memory that loses bits, without any error
message. What is saved next is spoilt, and every older checkpoint that is rotated away makes it worse.
Threads: pytorch/torchtitan#951, jade-hpc-gpu/jade-hpc-gpu.github.io#194.
"""

from __future__ import annotations

import math
from random import Random

from finitune.bench.faults import _recipe
from finitune.bench.recipe_load import RecipeLoad
from finitune.bench.workload import Expected

FAULT_CLASS = "T"
CASES = ()
RUNS = (("recipe_sft", "fp32"), ("recipe_sft", "fp16"), ("recipe_sft", "bf16"))


def plant(load: RecipeLoad, random: Random) -> Expected:
    """One element of a matrix is no number any more after a drawn step."""
    step, tensors = random.randint(2, load.steps - 4), _recipe.stored(load)
    name = random.choice(_recipe.matrices(load))
    index, value = random.randrange(tensors[name].numel()), random.choice((math.nan, math.inf, -math.inf))

    def spoil() -> None:
        load.parameter(name).data.view(-1)[index] = value

    load.between(step, spoil)
    return Expected(
        says=f"{name}[{index}] becomes {value} after step {step}",
        step=step + 1,
        codes=("SYS403",),
        places=(("parameter", name),),
        remedies=("repair_tensor", "roll_back", "retry"),
        never=("DAT", "OPT", "NUM4", "MOD"),
        data={"step": step, "parameter": name, "index": index, "value": str(value)},
    )
