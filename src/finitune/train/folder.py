"""The folder of a run: where it is, what it may touch, what it holds.

recipe.yaml      the fully resolved recipe: `finitune train recipe.yaml` runs the same again
journal.jsonl    every step, decision and finding
checkpoint-N/    training states
final/           the trained model as a transformers or peft folder
summary.json     what came out
"""

from __future__ import annotations

import time
from pathlib import Path

from finitune.core.errors import UserError
from finitune.engine.codes import OUTPUT_NOT_EMPTY, OUTPUT_UNUSABLE, RESUME_IMPOSSIBLE

RECIPE_FILE = "recipe.yaml"
JOURNAL_FILE = "journal.jsonl"
SUMMARY_FILE = "summary.json"
FINAL = "final"
RUNS = "runs"


def choose(output_dir: str, name: str) -> Path:
    """The folder of a new run; ``auto`` is ``runs/<name>-<time>``, numbered where that exists."""
    if output_dir != "auto":
        return Path(output_dir)
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = Path(RUNS) / stem, 1
    while path.exists():
        number += 1
        path = Path(RUNS) / f"{stem}-{number}"
    return path


def claim(path: Path, *, overwrite: bool) -> None:
    """Make the folder and prove that it can be written to.

    Raises:
        UserError: SYS003 where it holds something and ``overwrite`` is false; SYS004 where it is a
            file, read-only or on a full disk.
    """
    try:
        if path.exists() and not path.is_dir():
            raise NotADirectoryError("it is a file, not a folder")
        held = sorted(p.name for p in path.iterdir()) if path.exists() else []
        if held and not overwrite:
            first = ", ".join(held[:3])
            raise UserError(OUTPUT_NOT_EMPTY, "output_dir", path=str(path), count=len(held), first=first)
        if held:
            _move_aside(path)
        path.mkdir(parents=True, exist_ok=True)
        trial = path / ".writable"
        trial.write_bytes(b"\0" * 4096)
        trial.unlink()
    except OSError as error:
        raise UserError(OUTPUT_UNUSABLE, "output_dir", path=str(path), error=str(error)) from error


def _move_aside(path: Path) -> None:
    """Rename an old run, so that even overwriting loses nothing."""
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    path.rename(aside)


def find_run(name: str) -> Path:
    """The run folder that ``--resume NAME`` means: a path, or "latest" (newest journal under ``runs/``).

    Raises UserError SYS005 where there is none.
    """
    if name != "latest":
        path = Path(name)
        run = path.parent if path.name.startswith("checkpoint-") else path
        if not (run / RECIPE_FILE).is_file():
            raise UserError(RESUME_IMPOSSIBLE, "--resume", path=name, reason=f"no {RECIPE_FILE} there")
        return run
    journals = sorted(Path(RUNS).glob(f"*/{JOURNAL_FILE}"), key=lambda p: p.stat().st_mtime)
    if not journals:
        raise UserError(RESUME_IMPOSSIBLE, "--resume", path=f"{RUNS}/", reason="no run was found there")
    return journals[-1].parent
