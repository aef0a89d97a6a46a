"""H: the checkpoint's output is dead: its head holds zeros, or what reaches the head is zero.

What happens in the field: a converter that made the tensor and never filled it, a scale that was applied twice. Every
token is as likely as any other: the loss starts at the logarithm of the vocabulary, and nothing is non-finite.
Threads: NVIDIA-NeMo/Automodel#1980, huggingface/transformers#46002, meta-pytorch/torchtune#218.
"""

from __future__ import annotations

from random import Random

from finitune.bench.faults import _draw, _recipe
from finitune.bench.recipe_load import RecipeLoad
from finitune.bench.workload import Expected

FAULT_CLASS = "H"
CASES = (19,)
RUNS = (("recipe_sft", "fp32"), ("recipe_sft", "bf16"))
_NORM = "model.norm.weight"


def plant(load: RecipeLoad, random: Random) -> Expected:
    """The head or the last norm is zero, or so small that nothing of it is left in the loss."""
    tensors = _recipe.stored(load)
    name = random.choice((_recipe.HEAD, _NORM))
    factor = 0.0 if random.random() < 0.6 else _draw.log_uniform(random, 1e-30, 1e-5)
    tensors[name] *= factor
    _recipe.store(load, tensors)
    return Expected(
        says=f"{name} is multiplied by {_draw.spelled(factor)}",
        step=0,
        codes=("MOD111", "MOD115", "MOD400"),
        places=(("parameter", name), ("module", name.removesuffix(".weight"))),
        never=("NUM", "OPT", "DAT", "SYS"),
        reference="",
        data={"parameter": name, "factor": factor},
    )
