"""N: some lines of the file are no rows: bytes that are not UTF-8, JSON that was cut, fields of the wrong type.

What happens in the field: an export that was stopped, two encodings in one file, an emoji cut in half by a character
limit. Whoever reads such a file in one go fails at the first, or trains on what is left of them.

"""

from __future__ import annotations

import json
from random import Random
from typing import Any

from finitune.bench.faults import _recipe
from finitune.bench.recipe_load import RecipeLoad
from finitune.bench.workload import Expected

FAULT_CLASS = "N"
CASES = ()
RUNS = (("recipe_sft", "fp32"), ("recipe_sft", "fp16"))
_CODES = {
    "not UTF-8": ("DAT031",),
    "cut": ("DAT030",),
    "no object": ("DAT032",),
    "wrong type": ("DAT034",),
    "unknown role": ("DAT037",),
    "half a character": ("DAT047",),
}
# Bytes that begin nothing in UTF-8, and beginnings without the rest (RFC 3629).
_BYTES = (b"\xff", b"\xfe", b"\xc3", b"\xe9", b"\x80", b"\xf0\x9f\x98", b"\xc0\xaf")


def plant(load: RecipeLoad, random: Random) -> Expected:
    """Broken lines for a fiftieth to a quarter of the file stand among the healthy rows."""
    kinds = [random.choice(sorted(_CODES)) for _ in range(_recipe.some(random, load, 0.02, 0.25))]
    names = load.insert(random, [_broken(kind, random.choice(load.rows), random) for kind in kinds])
    return Expected(
        says=f"{len(names)} broken lines among {len(load.rows)}: {', '.join(sorted(set(kinds)))}",
        step=0,
        codes=tuple(dict.fromkeys(code for kind in kinds for code in _CODES[kind])),
        places=tuple(("row", name) for name in names),
        never=("NUM", "OPT", "MOD", "SYS"),
        data={"rows": names, "kinds": kinds},
    )


def _broken(kind: str, line: bytes, random: Random) -> bytes:
    if kind == "not UTF-8":
        # Behind a letter of the answer, so that the line is JSON but for these bytes.
        place = line.rindex(b'"content": "') + len(b'"content": "') + random.randint(1, 5)
        return line[:place] + random.choice(_BYTES) + line[place:]
    if kind == "cut":
        return line[: random.randint(1, len(line) - 1)]
    if kind == "no object":
        return json.dumps(random.choice((None, True, 17, "text", []))).encode()
    turns: list[dict[str, Any]] = _recipe.turns_of(line)
    turn = random.choice(turns)
    if kind == "wrong type":
        turn["content"] = {"text": turn["content"]}
    elif kind == "unknown role":
        turn["role"] = random.choice(("narrator", "moderator", "usr", ""))
    else:
        turn["content"] += chr(random.randint(0xD800, 0xDFFF))
    return _recipe.row_of(turns)
