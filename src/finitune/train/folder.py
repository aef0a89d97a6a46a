"""The folder of a run: where it is, what it may touch, what it holds.

recipe.yaml      the fully resolved recipe: `finitune train recipe.yaml` runs the same again
journal.jsonl    every step, decision and finding
checkpoint-N/    training states
final/           the trained model as a transformers or peft folder
summary.json     what came out
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from finitune.core.errors import UserError
from finitune.core.messages.catalogue import text
from finitune.engine.codes import OUTPUT_NOT_EMPTY, OUTPUT_UNUSABLE, RESUME_IMPOSSIBLE
from finitune.train import lock
from finitune.train.codes_runs import RUN_IN_USE

RECIPE_FILE = "recipe.yaml"
JOURNAL_FILE = "journal.jsonl"
SUMMARY_FILE = "summary.json"
FINAL = "final"
RUNS = "runs"
LATEST = "latest"
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_TRIAL_FILE = ".writable"
# What a run that was killed before it had a recipe leaves.
_BEFORE_A_RUN = re.compile(rf"{re.escape(lock.LOCK_FILE)}|{re.escape(_TRIAL_FILE)}|\.recipe\.yaml\..*\.tmp")


@dataclass(frozen=True, slots=True)
class Place:
    """What ``--resume NAME`` means."""

    run_dir: Path
    chosen: Path | None = None
    """The one checkpoint to go on from; None leaves the choice to the run."""


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
            file, read-only or on a full disk; SYS030 where what would be overwritten is being trained.
    """
    try:
        if path.exists() and not path.is_dir():
            raise NotADirectoryError("it is a file, not a folder")
        held = _content(path) if path.exists() else []
        if held and not overwrite:
            first = ", ".join(held[:3])
            raise UserError(OUTPUT_NOT_EMPTY, "output_dir", path=str(path), count=len(held), first=first)
        if held:
            refuse_in_use(path)
            _move_aside(path)
        path.mkdir(parents=True, exist_ok=True)
        trial = path / _TRIAL_FILE
        trial.write_bytes(b"\0" * 4096)
        trial.unlink()
    except OSError as error:
        raise unusable(path, error) from error


def _content(path: Path) -> list[str]:
    """What a folder holds, but for the beginnings of a run that never came to be. Raises OSError."""
    return sorted(name for name in os.listdir(path) if not _BEFORE_A_RUN.fullmatch(name))


def unusable(path: Path, error: OSError) -> UserError:
    """The error for a run folder that the system refuses to read or write."""
    return UserError(OUTPUT_UNUSABLE, "output_dir", path=str(path), error=str(error))


def refuse_in_use(path: Path) -> None:
    """Raise UserError SYS030 where a living process trains into the folder. Leaves no trace."""
    if lock.in_use(path):
        found = lock.holder(path)
        raise UserError(RUN_IN_USE, str(path), path=str(path), pid=found.get("pid", "?"), host=found.get("host", "?"))


def _move_aside(path: Path) -> None:
    """Rename an old run, so that even overwriting loses nothing."""
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    path.rename(aside)


def find_place(name: str) -> Place:
    """The run, or one checkpoint of it, that ``--resume NAME`` means: a path, or "latest" (the newest in ``runs/``).

    Raises UserError SYS005 with the reason where there is none.
    """
    if name == LATEST:
        return Place(_latest())
    path = Path(os.path.expanduser(name))
    if _has_recipe(path):
        return Place(path)
    if _has_recipe(path.parent) and _CHECKPOINT.fullmatch(path.name) and os.path.isdir(path):
        return Place(path.parent, path)
    raise UserError(RESUME_IMPOSSIBLE, "--resume", path=name, reason=_why_not(path))


def _has_recipe(path: Path) -> bool:
    """A run: where recipe.yaml was lost, the journal that was begun after it tells the recipe too."""
    # os.path, not pathlib: a name may be no possible path at all.
    return os.path.isfile(path / RECIPE_FILE) or _has_journal(path)


def _has_journal(path: Path) -> bool:
    try:
        return os.path.getsize(path / JOURNAL_FILE) > 0
    except (OSError, ValueError):
        return False


def without_recipe(path: Path) -> UserError:
    """Neither recipe.yaml nor anything else tells the recipe of this run."""
    return UserError(RESUME_IMPOSSIBLE, "--resume", path=str(path), reason=_why_no_recipe(path))


def _why_not(path: Path) -> str:
    """The reason why nothing can be resumed there."""
    if not os.path.exists(path):
        beside = text("resume.no.part", run=path.parent) if _has_recipe(path.parent) else ""
        return text("resume.no.nothing") + beside
    if _has_recipe(path.parent):
        return text("resume.no.other_part", run=path.parent)
    if not os.path.isdir(path):
        return text("resume.no.file")
    try:
        held, begun = _content(path), os.listdir(path)
    except OSError as error:
        return text("resume.no.unreadable", error=error)
    if not held:
        return text("resume.no.not_begun", found=", ".join(begun[:3])) if begun else text("resume.no.empty")
    return _why_no_recipe(path)


def _why_no_recipe(path: Path) -> str:
    held = _content(path)
    key = "resume.no.not_begun" if JOURNAL_FILE in held else "resume.no.recipe"
    return text(key, found=", ".join(held[:3]))


def _latest() -> Path:
    """The run under ``runs/`` that was written to last. Raises UserError SYS005 where there is none."""
    runs = [path for path in Path(RUNS).glob("*") if _has_recipe(path)]
    if not runs:
        raise UserError(RESUME_IMPOSSIBLE, "--resume", path=f"{RUNS}/", reason=text("resume.no.runs"))
    return max(runs, key=_written_s)


def _written_s(run_dir: Path) -> float:
    """When a run's journal, or before its first line its recipe, was last written to (seconds since 1970)."""
    times_s = [0.0]
    for name in (JOURNAL_FILE, RECIPE_FILE):
        try:
            times_s.append((run_dir / name).stat().st_mtime)
        except OSError:
            continue
    return max(times_s)
