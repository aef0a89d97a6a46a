"""N: a few rows stand in the file many times over, and the model learns them by heart.

What happens in the field: an upload that was repeated, an upsampling that nobody remembers, a join that multiplied.
The training loss falls all the faster.
"""

from __future__ import annotations

from random import Random

from finitune.bench.faults import _recipe
from finitune.bench.recipe_load import RecipeLoad
from finitune.bench.workload import Expected

FAULT_CLASS = "N"
CASES = ()
RUNS = (("recipe_sft", "fp32"), ("recipe_sft", "bf16"))


def plant(load: RecipeLoad, random: Random) -> Expected:
    """Copies of one to five rows are added: a tenth to four times as many as there are rows."""
    originals = random.sample(load.rows, random.randint(1, 5))
    lines = [random.choice(originals) for _ in range(_recipe.some(random, load, 0.1, 4.0))]
    load.insert(random, lines)
    return Expected(
        says=f"{len(lines)} of {len(load.rows)} rows are copies of {len(originals)}",
        step=0,
        codes=("DAT076",),
        never=("NUM", "OPT", "MOD", "SYS"),
        reference="",
        data={"copies": len(lines)},
    )
