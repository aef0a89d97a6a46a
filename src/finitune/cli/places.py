"""Which model a path on the command line means."""

from __future__ import annotations

import os
from pathlib import Path

from finitune.cli.codes import NO_MODEL_IN_RUN
from finitune.core.errors import UserError

_MARKS = ("recipe.yaml", "journal.jsonl")
_MODEL_FILES = ("config.json", "adapter_config.json")


def model_of(name: str) -> str:
    """A run becomes its final model, else its newest checkpoint; any other name stays as it is.

    Raises UserError NO_MODEL_IN_RUN for a run that has neither.
    """
    path = Path(name).expanduser()
    if holds_model(path) or not any(os.path.isfile(path / mark) for mark in _MARKS):
        return name
    final = path / "final"
    if holds_model(final):
        return str(final)
    found = [c for c in path.glob("checkpoint-*") if _step(c) is not None and holds_model(c)]
    if not found:
        raise UserError(NO_MODEL_IN_RUN, name, path=name)
    return str(max(found, key=lambda c: _step(c) or 0))


def holds_model(folder: Path) -> bool:
    """Whether a folder is a transformers or peft folder."""
    # os.path, not pathlib: a name may be no possible path at all.
    return any(os.path.isfile(folder / name) for name in _MODEL_FILES)


def _step(folder: Path) -> int | None:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else None
