"""What faults of a recipe change: rows of the file, the folder of the base model, the folder of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from finitune.bench.recipe_load import RecipeLoad
from finitune.core.files import read_manifest, write_manifest

WEIGHTS = "model.safetensors"
HEAD = "lm_head.weight"
_SHORT = "the|of|and|to|in|it|is|was|for|on|that|with|as|his|they|at|be|this|from|have|or|by|one|had|not|but"


def stored(load: RecipeLoad) -> dict[str, Tensor]:
    """The tensors of the base model's file, to be changed and stored again."""
    return read_tensors(load.base / WEIGHTS)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file in memory of their own, so that the file can be written anew."""
    return {name: tensor.clone() for name, tensor in load_file(str(path)).items()}


def store(load: RecipeLoad, tensors: dict[str, Tensor]) -> None:
    """Write the base model's file anew."""
    save_file({n: t.contiguous() for n, t in tensors.items()}, str(load.base / WEIGHTS), metadata={"format": "pt"})


def matrices(load: RecipeLoad) -> list[str]:
    """Names of the weights of two dimensions inside the decoder layers."""
    return sorted(n for n, t in stored(load).items() if ".layers." in n and t.dim() > 1)


def layers(load: RecipeLoad) -> list[str]:
    """Dotted names of the decoder layers."""
    return sorted({".".join(n.split(".")[:3]) for n in matrices(load)})


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON object on the disk."""
    held = json.loads(path.read_text(encoding="utf-8"))
    change(held)
    path.write_text(json.dumps(held, indent=1), encoding="utf-8")


def seal(folder: Path, *without: str) -> None:
    """Write a folder's manifest anew for the files as they are, ``without`` some of what it said."""
    facts = read_manifest(folder)
    write_manifest(folder, {k: v for k, v in facts.items() if k not in ("schema", "files", "self", *without)})


def newest(run_dir: Path) -> Path:
    """The checkpoint of the latest step."""
    return max(run_dir.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))


def template(load: RecipeLoad, source: str) -> None:
    """Have the recipe name a file with this chat template."""
    path = load.folder / "template.jinja"
    path.write_text(source, encoding="utf-8")
    load.overrides["model.chat_template"] = str(path)


def some(random: Random, load: RecipeLoad, low: float, high: float) -> int:
    """How many rows a share of the file is, at least one; every magnitude as likely as any other."""
    share: float = low * (high / low) ** random.random()
    return max(1, round(share * len(load.rows)))


def turns_of(line: bytes) -> list[dict[str, Any]]:
    """The turns of a healthy row."""
    found: list[dict[str, Any]] = json.loads(line)["messages"]
    return found


def row_of(turns: Sequence[dict[str, Any]]) -> bytes:
    """A row as a line of JSON."""
    return json.dumps({"messages": list(turns)}).encode()


def wordy(random: Random, characters: int) -> str:
    """So many characters of words, or a few more."""
    words: list[str] = []
    size = 0
    while size < characters:
        words.append(random.choice(_SHORT.split("|")))
        size += len(words[-1]) + 1
    return " ".join(words)
