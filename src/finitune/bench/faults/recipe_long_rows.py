"""A: a few rows are longer than ``max_length``; the answer of such a row may be what is cut off.

Cut on the right, a row whose prompt alone fills the window keeps not one target; a row whose answer is too long loses
its end, and with it the token that stops. The share is small, so no loss curve shows it.
Threads: ymcui/Chinese-LLaMA-Alpaca-2#424, huggingface/trl#6668.
"""

from __future__ import annotations

from random import Random

from finitune.bench.faults import _draw, _recipe
from finitune.bench.recipe_load import RecipeLoad
from finitune.bench.workload import Expected

FAULT_CLASS = "A"
CASES = (3,)
RUNS = (("recipe_sft", "fp32"), ("recipe_sft", "bf16"))
_SHORTENED, _CUT, _LOST = ("DAT060", "DAT061"), ("DAT062",), ("DAT042", "DAT043", "DAT044")
# (what is long, what gives way) -> what is to be said, where something of the row is still trained on
_KEPT = {
    ("prompt", "truncate_prompt"): _SHORTENED,
    ("prompt", "truncate_answer"): _SHORTENED,
    ("answer", "truncate_answer"): _CUT,
}


def plant(load: RecipeLoad, random: Random) -> Expected:
    """One to five rows of a hundred have a system text, a prompt or an answer far beyond the window."""
    part = random.choice(("system", "prompt", "answer"))
    gives_way = random.choice(("truncate_prompt", "truncate_answer", "drop_row"))
    load.overrides["data.truncation"] = gives_way
    limit = int(load.overrides["data.max_length"])
    lines = []
    for _ in range(_recipe.some(random, load, 0.01, 0.05)):
        turns = _recipe.turns_of(random.choice(load.rows))
        # No token holds more than four letters.
        words = _recipe.wordy(random, round(_draw.log_uniform(random, 4 * limit, 40 * limit)))
        if part == "system":
            turns.insert(0, {"role": "system", "content": words})
        else:
            turns[-2 if part == "prompt" else -1]["content"] = words
        lines.append(_recipe.row_of(turns))
    names, kept = load.insert(random, lines), _KEPT.get((part, gives_way))
    return Expected(
        says=f"{len(names)} rows with a {part} beyond {limit} tokens, {gives_way}: {', '.join(names)}",
        step=0,
        codes=kept or _LOST,
        places=tuple(("row", name) for name in names),
        never=("NUM", "OPT", "MOD", "SYS"),
        reference="" if kept else "clean",
        data={"rows": names, "part": part, "truncation": gives_way},
    )
