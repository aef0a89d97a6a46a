"""H: a tensor is missing in the checkpoint, most often the output head; what is in its place is whatever memory held.

What happens in the field: a converter that drops a key, a save that took the head for tied. Loaded without strictness
the weight is random or uninitialised, and the loss starts far above where it was.
Threads: NVIDIA-NeMo/Automodel#1980, huggingface/transformers#46002, meta-pytorch/torchtune#218.
"""

from __future__ import annotations

from random import Random

from finitune.bench.faults import _recipe
from finitune.bench.recipe_load import RecipeLoad
from finitune.bench.workload import Expected

FAULT_CLASS = "H"
CASES = (18,)
RUNS = (("recipe_sft", "fp32"), ("recipe_sft", "bf16"))


def plant(load: RecipeLoad, random: Random) -> Expected:
    """The head, or one to three tensors of the file, are gone; or they have the name of another layout."""
    tensors = _recipe.stored(load)
    names = [_recipe.HEAD] if random.random() < 0.5 else random.sample(sorted(tensors), random.randint(1, 3))
    renamed = random.random() < 0.3
    for name in names:
        tensor = tensors.pop(name)
        if renamed:
            tensors[f"transformer.{name}"] = tensor
    _recipe.store(load, tensors)
    return Expected(
        says=f"the checkpoint {'names otherwise' if renamed else 'lacks'} {', '.join(names)}",
        step=0,
        codes=("MOD010", "MOD115"),
        places=tuple(("parameter", name) for name in names),
        remedies=("halt",),
        never=("NUM", "OPT", "DAT", "SYS"),
        reference="",
        data={"names": names, "renamed": renamed},
    )
