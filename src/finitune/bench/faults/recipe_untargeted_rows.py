"""A: rows of the file in which nothing is to be learnt: no answer, an empty one, or one that is not to be trained.

With gradient accumulation the log looks healthy: a micro-batch without targets adds nothing to the loss, and the rows
are lost in every epoch; alone in a step their loss is 0/0. What is missing is in the file, and can be told before the
first step, row by row. Threads: huggingface/trl#6668, MakazhanAlpamys/Soup#532.
"""

from __future__ import annotations

from random import Random
from typing import Any

from finitune.bench.faults import _recipe
from finitune.bench.recipe_load import RecipeLoad
from finitune.bench.workload import Expected

FAULT_CLASS = "A"
CASES = (2,)
RUNS = (("recipe_sft", "fp32"), ("recipe_sft", "bf16"))
_CODES = {
    "empty": ("DAT035",),
    "blank": ("DAT035", "DAT042"),
    "unanswered": ("DAT038",),
    "untrained": ("DAT038",),
    "null": ("DAT033", "DAT035"),
}


def plant(load: RecipeLoad, random: Random) -> Expected:
    """Rows for a twentieth to a half of the file stand among the healthy ones."""
    kinds = [random.choice(sorted(_CODES)) for _ in range(_recipe.some(random, load, 0.05, 0.5))]
    lines = [_recipe.row_of(_turns(kind, _recipe.turns_of(random.choice(load.rows)), random)) for kind in kinds]
    names = load.insert(random, lines)
    return Expected(
        says=f"{len(names)} rows among {len(load.rows)} teach nothing: {', '.join(sorted(set(kinds)))}",
        step=0,
        codes=(*dict.fromkeys(code for kind in kinds for code in _CODES[kind]), "DAT114", "DAT400"),
        places=tuple(("row", name) for name in names),
        never=("NUM", "OPT", "MOD", "SYS"),
        data={"rows": names, "kinds": kinds},
    )


def _turns(kind: str, turns: list[dict[str, Any]], random: Random) -> list[dict[str, Any]]:
    answer = turns[-1]
    if kind == "unanswered":
        return turns[:-1]
    if kind == "untrained":
        answer["weight"] = 0
    elif kind == "null":
        answer["content"] = None
    else:
        answer["content"] = "" if kind == "empty" else "".join(random.choices(" \n\t", k=random.randint(1, 9)))
    return turns
