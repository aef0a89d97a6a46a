"""Runs as they stand on the disk: which folders are runs, how far each is, what it left.

A run is a folder that holds a journal or a recipe. Nothing is written, no lock is kept, torch is not loaded; the
journal is read at its ends only (``run_ends.py``), so that a list of a hundred long runs is quick. Everything may
change or vanish while it is looked at.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from finitune.core.files import MANIFEST, file_digest, read_manifest, verify_manifest
from finitune.train.folder import JOURNAL_FILE, RECIPE_FILE
from finitune.train.lock import holder, in_use
from finitune.train.run_ends import Ends, ends_of, integer, real, used_up

# The names of train/checkpoint.py, train/keeper.py and train/resume.py, which load torch.
CHECKPOINT_PREFIX = "checkpoint-"
TRUSTED_FILE = "trusted.json"
ASIDE_PREFIXES = ("abandoned-", "damaged-")

_CODE = re.compile(r"[A-Z]{3}\d{3}\b")
_MAX_STEPS = re.compile(rb"^max_steps: *(\d{1,18}) *$", re.MULTILINE)
_RECIPE_BYTES = 64 << 10


class State(str, Enum):
    """How a run stands."""

    RUNNING = "running"
    """A living process holds its lock."""
    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    """Stopped on request."""
    HALTED = "halted"
    """Stopped by the guard."""
    KILLED = "killed"
    """Its last session began and did not end, and nobody is at it: a crash, SIGKILL, a power cut."""
    NOT_STARTED = "not_started"
    """It has a recipe, but its journal tells of no start."""
    DAMAGED = "damaged"
    """Its journal holds something, but not one record."""
    UNREADABLE = "unreadable"


_ENDS = {"finished": State.FINISHED, "interrupted": State.INTERRUPTED, "halted": State.HALTED}
_MAY_GO_ON = (State.INTERRUPTED, State.HALTED, State.KILLED, State.NOT_STARTED, State.DAMAGED)


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A checkpoint folder."""

    path: Path
    step: int
    trusted: bool
    """Enough clean steps followed it; else it is a candidate."""
    num_bytes: int
    faults: tuple[str, ...] | None = None
    """What is wrong with it, one sentence each; None where nobody looked."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-able record."""
        return {
            "name": self.path.name,
            "step": self.step,
            "trusted": self.trusted,
            "bytes": self.num_bytes,
            "faults": None if self.faults is None else list(self.faults),
        }


@dataclass(frozen=True, slots=True)
class Run:
    """One run as it stood when it was looked at; None and empty where something is unknown."""

    path: Path
    state: State
    changed_s: float
    """When journal or recipe (else the folder) last changed: seconds since 1970."""
    num_bytes: int = 0
    code: str | None = None
    """Why it was halted."""
    reason: str = ""
    """Why it is unreadable, in the system's words or the journal's."""
    step: int | None = None
    """Batches used up."""
    total_steps: int | None = None
    loss: float | None = None
    """Of the last journalled step; NaN and inf are kept."""
    eval_first: float | None = None
    """The first held-out loss."""
    eval_last: float | None = None
    """The newest one; None where there was only one."""
    checkpoints: tuple[CheckpointInfo, ...] = ()
    """Newest first."""
    num_damaged_lines: int = 0
    """Lines of the journal that are no record, as far as was read."""
    holder: Mapping[str, Any] = field(default_factory=dict)
    """Of a running one: "pid" and "host", where known."""
    has_recipe: bool = True
    has_lost_checkpoints: bool = False
    """The journal tells of checkpoints, and none is there."""

    @property
    def can_go_on(self) -> bool:
        """Whether ``finitune train --resume`` can be tried; without a checkpoint it begins at the first step."""
        return self.state in _MAY_GO_ON and self.has_recipe and not self.has_lost_checkpoints

    def to_json(self) -> dict[str, Any]:
        """A JSON-able record (non-finite numbers are encoded by the printer)."""
        newest = self.checkpoints[0].step if self.checkpoints else None
        plain = ("code", "step", "total_steps", "loss", "eval_first", "eval_last", "num_damaged_lines", "can_go_on")
        return {
            "name": self.path.name,
            "path": str(self.path),
            "state": self.state.value,
            "reason": self.reason or None,
            **{name: getattr(self, name) for name in plain},
            "has_lost_checkpoints": self.has_lost_checkpoints,
            "num_checkpoints": len(self.checkpoints),
            "num_trusted": sum(c.trusted for c in self.checkpoints),
            "newest_checkpoint_step": newest,
            "bytes": self.num_bytes,
            "changed_time": self.changed_s,
            "holder": dict(self.holder) or None,
        }


def is_run(path: Path) -> bool:
    """Whether a folder is a run."""
    # os.path, not pathlib: a name may be no possible path at all.
    return any(os.path.lexists(path / mark) for mark in (JOURNAL_FILE, RECIPE_FILE))


def listed(folder: Path) -> list[Run]:
    """The runs directly inside ``folder``, the newest change first. Raises OSError where it cannot be listed."""
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if not e.name.startswith(".") and _is_folder(e)]
    found = [look(folder / name) for name in names if is_run(folder / name)]
    # One that was deleted meanwhile is no run any more.
    runs = [run for run in found if os.path.isdir(run.path)]
    return sorted(runs, key=lambda run: (-run.changed_s, run.path.name))


def look(path: Path) -> Run:
    """How one run stands. Never raises OSError: what cannot be read is ``State.UNREADABLE`` with its reason."""
    held = in_use(path)
    changed_s = _changed_s(path)
    try:
        checkpoints = tuple(checkpoints_of(path))
        common: dict[str, Any] = {
            "path": path,
            "changed_s": changed_s,
            "num_bytes": size_of(path),
            "checkpoints": checkpoints,
            "has_recipe": os.path.isfile(path / RECIPE_FILE),
        }
        try:
            ends = ends_of(path / JOURNAL_FILE)
        except FileNotFoundError:
            os.stat(path)
            ends = Ends()
    except OSError as error:
        return Run(path, State.UNREADABLE, changed_s, reason=error.strerror or str(error))
    # Who took the lock after the first look has journalled an opening that looks like a killed session.
    held = held or (ends.end is None and in_use(path))
    return _run(ends, held=held, common=common)


def checkpoints_of(run_dir: Path) -> Iterator[CheckpointInfo]:
    """The checkpoints of a run, newest first; none of them is verified. Raises OSError."""
    with os.scandir(run_dir) as entries:
        names = [e.name for e in entries if step_in(e.name) is not None and _is_folder(e)]
    for name in sorted(names, key=lambda n: step_in(n) or 0, reverse=True):
        path = run_dir / name
        yield CheckpointInfo(path, step_in(name) or 0, is_trusted(path), size_of(path))


def step_in(name: str) -> int | None:
    """The step in the name of a checkpoint; None for any other name."""
    number = name[len(CHECKPOINT_PREFIX) :]
    fits = name.startswith(CHECKPOINT_PREFIX) and number.isascii() and number.isdigit() and len(number) <= 18
    return int(number) if fits else None


def is_trusted(checkpoint: Path) -> bool:
    """Whether the mark of trust is there and belongs to this manifest."""
    try:
        record = json.loads((checkpoint / TRUSTED_FILE).read_bytes())
        return bool(record["manifest_sha256"] == file_digest(checkpoint / MANIFEST))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def faults_of(checkpoint: Path, *, digests: bool) -> tuple[str, ...]:
    """What is wrong with a checkpoint, one sentence each: sizes alone, or (slow) sizes and digests."""
    try:
        if digests:
            return tuple(verify_manifest(checkpoint, beside=(TRUSTED_FILE,)))
        files = read_manifest(checkpoint)["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return (f"{MANIFEST}: {error}",)
    return tuple(fault for name, facts in files.items() if (fault := _size_fault(checkpoint, name, facts)))


def _size_fault(checkpoint: Path, name: str, facts: Any) -> str:
    expected = facts.get("bytes") if isinstance(facts, dict) else None
    try:
        found = os.stat(checkpoint / name).st_size
    except (OSError, ValueError):
        return f"{name}: missing"
    return "" if found == expected else f"{name}: {found} bytes, expected {expected}"


def size_of(folder: Path) -> int:
    """Bytes of all files below ``folder``; links are not followed, what vanishes or is closed counts nothing."""
    total, folders = 0, [os.fspath(folder)]
    while folders:
        with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
    return total


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _changed_s(path: Path) -> float:
    """When a run was last written to; now, where not even that can be read."""
    for names in ((JOURNAL_FILE, RECIPE_FILE), ("",)):
        times_s = []
        for name in names:
            with contextlib.suppress(OSError):
                times_s.append(os.stat(path / name).st_mtime)
        if times_s:
            return max(times_s)
    return time.time()


def _run(ends: Ends, *, held: bool, common: dict[str, Any]) -> Run:
    state = _state(ends, held=held)
    halted = ends.end.get("halted") if ends.end is not None else None
    code = _CODE.match(halted) if state is State.HALTED and isinstance(halted, str) else None
    step = used_up(ends.move)
    return Run(
        state=state,
        code=code[0] if code else None,
        reason=f"status {ends.end.get('status')!r}" if state is State.UNREADABLE and ends.end is not None else "",
        step=step,
        total_steps=_total_steps(ends, step, common["path"]),
        loss=real(ends.step, "loss"),
        eval_first=real(ends.first_eval, "loss"),
        eval_last=None if ends.last_eval == ends.first_eval else real(ends.last_eval, "loss"),
        num_damaged_lines=ends.num_damaged,
        has_lost_checkpoints=ends.saved and not common["checkpoints"],
        holder={k: v for k, v in holder(common["path"]).items() if k != "time"} if held else {},
        **common,
    )


def _state(ends: Ends, *, held: bool) -> State:
    if held:
        return State.RUNNING
    if ends.end is not None:
        return _ENDS.get(str(ends.end.get("status")), State.UNREADABLE)
    if ends.num_records:
        return State.KILLED
    return State.DAMAGED if ends.num_bytes else State.NOT_STARTED


def _total_steps(ends: Ends, step: int | None, run_dir: Path) -> int | None:
    """Steps in all: of the newest opening that was met, else of the recipe; never less than the run has done."""
    for opening in (ends.opening, ends.first):
        total = integer(opening, "total_steps")
        if total is not None and total >= (step or 0):
            return total
    try:
        with (run_dir / RECIPE_FILE).open("rb") as handle:
            found = _MAX_STEPS.search(handle.read(_RECIPE_BYTES))
    except OSError:
        return None
    return int(found[1]) if found and int(found[1]) >= (step or 0) else None
