"""The keeper of a run's checkpoints: when they are written, when they are trusted, which are kept.

save        copy the state, hand it to the writer; the training thread waits for the copy only
after_step  what was written is journalled; candidates become trusted; a failed save is tried again
rotate      never removes the last trusted one, the candidate that will be trusted next, the best, or a milestone
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finitune.core import journal
from finitune.core.errors import Halted
from finitune.core.files import remove_folder
from finitune.core.journal import Journal
from finitune.core.types import Finding
from finitune.core.units import bytes_text
from finitune.engine.codes import CHECKPOINT_BAD
from finitune.engine.codes_time import SAVE_RETRY
from finitune.engine.line import line_of
from finitune.engine.snapshot import Buffers, is_out_of_memory
from finitune.numerics.statecheck import bad_tensors
from finitune.train import checkpoint
from finitune.train.codes_journal import RUN_FOLDER_GONE
from finitune.train.loop import record_or_halt
from finitune.train.step import TrainPort
from finitune.train.writer import Writer, Written

ABANDONED = "abandoned-"
_TRUST_RETRY_STEPS = 20
_TRUST = "trust"


@dataclass(frozen=True, slots=True)
class KeepSettings:
    """What is kept, and from when on it is trusted."""

    limit: int = 2
    """Newest checkpoints kept."""
    every_steps: int | None = None
    """Checkpoints of these steps are kept for good."""
    best: bool = False
    """Keep the one with the lowest held-out loss."""
    minutes: float | None = None
    """A checkpoint, too, when the newest was begun so long ago."""
    trust_steps: int = 40
    """Clean steps after which a candidate is trusted."""
    background: bool = True


@dataclass(slots=True)
class _Retry:
    """A failed save that will be tried again, at growing distances."""

    at_step: int
    distance_steps: int = 1


@dataclass(slots=True)
class Keeper:
    """Keeps the checkpoints of one run."""

    run_dir: Path
    port: TrainPort
    tokenizer: Any
    journal: Journal
    settings: KeepSettings
    found: Callable[[Finding], None]
    """Journals a finding and tells the observers."""
    saved: Callable[[Path, int], None]
    """Tells the observers of a checkpoint."""
    mend: Callable[[], None] = field(default=lambda: None)
    """Puts back what a run folder needs besides, after it has vanished. May raise OSError."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    line: int = 0
    last_saved: Path | None = None
    stall_s: float = 0.0
    """Seconds the training thread waited for saves."""
    losses: dict[int, float] = field(default_factory=dict)
    """Finite held-out losses of the line, by step."""
    _writer: Writer = field(init=False)
    _buffers: Buffers = field(default_factory=Buffers)
    _candidates: list[Path] = field(default_factory=list)
    _retry: _Retry | None = None
    _looking_at: list[Path] = field(default_factory=list)
    """Candidates that the writer looks at, in its order."""
    _no_trust_before_step: int = 0
    _last_try: bool = False
    _begun_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._writer = Writer(background=self.settings.background)
        self._candidates = [p for p in checkpoint.listed(self.run_dir) if not checkpoint.is_trusted(p)]

    @property
    def best(self) -> tuple[float, int] | None:
        """Lowest held-out loss of the line and its step."""
        return min(((loss, step) for step, loss in self.losses.items()), default=None)

    @property
    def busy(self) -> bool:
        """A checkpoint is being written."""
        return self._writer.busy

    def recall(self) -> None:
        """Take what an earlier session of the run left: how often it went back, its best held-out loss.

        Checkpoints beyond the one the run goes on from are damaged or of another line: they are put aside, so that
        they are not counted among the newest.
        """
        records = list(journal.read(self.journal.path))
        self.line = len(line_of(records).rollbacks)
        for record in records:
            with contextlib.suppress(KeyError, TypeError, ValueError):  # not a record of ours
                self._recall(record)
        self._put_aside_after(step_in(self.last_saved) if self.last_saved is not None else 0)

    def _recall(self, record: Mapping[str, Any]) -> None:
        kind = record["kind"]
        if kind == "eval":
            self.evaluated(int(record["step"]), journal.number(record["loss"]))
        elif kind in ("resume", "rollback"):
            self._forget_after(int(record["to_step" if kind == "rollback" else "step"]))

    def save(self, step: int) -> None:
        """Begin a checkpoint of the present state; waits for the one before, if that is still being written."""
        started_s = time.perf_counter()
        self._begun_s = time.monotonic()
        self.settle(wait=True)
        try:
            self._sync_journal()
        except OSError as error:
            self._failed(Written(step, None, error))
        else:
            content = self._content()
            work = functools.partial(checkpoint.write, content, self.port.parts, self.tokenizer, self.run_dir)
            self._writer.submit(step, work)
        if not self._writer.background:
            self.settle()
        self.stall_s += time.perf_counter() - started_s

    def _sync_journal(self) -> None:
        """The journal goes first: a checkpoint is never ahead of it. Raises OSError."""
        try:
            self.journal.sync()
        except FileNotFoundError:
            # The run folder was taken away. Where it is back, or stands anew, the run goes on in it.
            self.journal.reopen()
            self.mend()
            self.journal.sync()

    def _content(self) -> checkpoint.Content:
        """A copy of the state, or (no memory, or nobody works beside us) the live tensors."""
        if self._writer.background:
            try:
                tensors, record = self._buffers.copy(self.port)
                return checkpoint.Content(tensors, record, self.line, self.facts, self.journal.link)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._writer, self._buffers = Writer(background=False), Buffers()
        tensors = dict(self.port.state_tensors())
        return checkpoint.Content(tensors, self.port.state_record(), self.line, self.facts, self.journal.link)

    def after_step(self, step: int) -> None:
        """Look after what is under way. Raises Halted where a state to be saved was not finite."""
        self.settle()
        if self._overdue(step) and not self._writer.busy:
            self.save(step)
        self._trust(step)

    def _overdue(self, step: int) -> bool:
        """A failed save is to be tried again, or the newest checkpoint is old."""
        if self._retry is not None:
            return step >= self._retry.at_step
        minutes = self.settings.minutes
        return minutes is not None and time.monotonic() - self._begun_s >= 60.0 * minutes

    def finish(self, step: int) -> bool:
        """A checkpoint of this very step, unless it stands already; waits until it is written. True if it stands."""
        self.settle(wait=True)
        if self.last_saved is None or step_in(self.last_saved) != step:
            self._last_try = True
            self.save(step)
            self.settle(wait=True)
        return self.last_saved is not None and step_in(self.last_saved) == step

    def settle(self, *, wait: bool = False) -> None:
        """Take in what the writer has finished. Raises Halted (state not finite)."""
        for written in self._writer.finished(wait=wait):
            if written.task == _TRUST:
                self._looked_at(written)
            elif written.path is not None:
                self._stands(written.path, written.step)
            else:
                self._failed(written)

    def _stands(self, path: Path, step: int) -> None:
        self.last_saved, self._retry = path, None
        if not checkpoint.is_trusted(path):
            self._candidates = [path, *(p for p in self._candidates if p != path)]
        self.rotate()
        record_or_halt(self.journal, "save", step=step, path=path.name, line=self.line)
        self.saved(path, step)

    def _failed(self, written: Written) -> None:
        """A refusing disk is a finding and a later try; so is a bad state that was mended since."""
        error = written.error
        if isinstance(error, Halted) and not bad_tensors(self.port.state_tensors()):
            self.found(error.code.find(error.where, **error.data))
            self._retry = _Retry(self.port.state.step + 1, 1)
            return
        if not isinstance(error, OSError):
            assert error is not None
            raise error
        target = self.run_dir / f"{checkpoint.PREFIX}{written.step}"
        needed_bytes = sum(t.nbytes for _, t in self.port.state_tensors())
        if self._last_try:
            self.found(checkpoint.save_failure(target, error, needed_bytes))
            return
        distance = 1 if self._retry is None else self._retry.distance_steps * 2
        self._retry = _Retry(self.port.state.step + distance, distance)
        if not self.run_dir.is_dir():
            pending = bytes_text(self.journal.pending_bytes)
            self.found(
                RUN_FOLDER_GONE.find(str(self.run_dir), path=str(self.run_dir), error=str(error), pending=pending)
            )
            return
        self.found(
            SAVE_RETRY.find(
                str(target),
                step=written.step,
                error=str(error),
                retry=self._retry.at_step,
                last=step_in(self.last_saved) if self.last_saved is not None else 0,
                free=checkpoint.free_text(target),
                needed=bytes_text(needed_bytes),
            )
        )

    def _trust(self, step: int) -> None:
        """Candidates that enough clean steps have followed are looked at once more, and become trusted."""
        needed = self.settings.trust_steps
        if self.port.state.clean_steps < needed or step < self._no_trust_before_step:
            return
        for path in [p for p in self._candidates if step_in(p) <= step - needed and p not in self._looking_at]:
            self._looking_at.append(path)
            self._writer.submit(step, functools.partial(look_and_trust, path, step), task=_TRUST)
        if not self._writer.background:
            self.settle()

    def _looked_at(self, written: Written) -> None:
        """A candidate is trusted now, or cannot be, or the disk did not take the mark."""
        path, self._looking_at = self._looking_at[0], self._looking_at[1:]
        error = written.error
        if isinstance(error, OSError):
            self._no_trust_before_step = written.step + _TRUST_RETRY_STEPS
            self.found(checkpoint.save_failure(path / checkpoint.TRUSTED_FILE, error, 0))
            return
        self._candidates = [p for p in self._candidates if p != path]
        if isinstance(error, Untrustworthy):
            self.found(CHECKPOINT_BAD.find(str(path), path=str(path), faults=str(error)))
        elif error is not None:
            raise error
        else:
            record_or_halt(self.journal, "trusted", step=written.step, path=path.name)
            self.rotate()
            for left in self.run_dir.glob(f"{ABANDONED}*"):
                _discard(left)

    def evaluated(self, step: int, loss: float) -> None:
        """Take a held-out loss into account; one that is not finite never is the best."""
        if math.isfinite(loss):
            self.losses[step] = loss

    def rotate(self) -> None:
        """Remove what need not be kept."""
        here = checkpoint.listed(self.run_dir)
        kept = self._kept(here)
        for path in here:
            if path not in kept:
                _discard(path)
                self._candidates = [p for p in self._candidates if p != path]

    def _kept(self, here: list[Path]) -> set[Path]:
        """Newest first in ``here``."""
        kept = {*here[: max(1, self.settings.limit)], *self._looking_at}
        trusted = next((p for p in here if checkpoint.is_trusted(p)), None)
        if trusted is not None:
            kept.add(trusted)
        waiting = [p for p in here if p in self._candidates and (trusted is None or step_in(p) > step_in(trusted))]
        # Without the oldest waiting one, a short save_steps would rotate every candidate away before its time.
        kept.update(waiting[-1:])
        every = self.settings.every_steps
        kept.update(p for p in here if every and step_in(p) % every == 0)
        if self.settings.best:
            known = [p for p in here if step_in(p) in self.losses]
            kept.update(sorted(known, key=lambda p: (self.losses[step_in(p)], step_in(p)))[:1])
        return kept

    def abandon_after(self, step: int) -> None:
        """Put the checkpoints of a line that was left aside; they are removed when a newer one is trusted."""
        self.settle(wait=True)
        self.line += 1
        self._forget_after(step)
        self._put_aside_after(step)
        if self.last_saved is not None and not self.last_saved.is_dir():
            self.last_saved = next(iter(checkpoint.listed(self.run_dir)), None)

    def _forget_after(self, step: int) -> None:
        self.losses = {at: loss for at, loss in self.losses.items() if at <= step}

    def _put_aside_after(self, step: int) -> None:
        for path in [p for p in checkpoint.listed(self.run_dir) if step_in(p) > step]:
            # Where the disk refuses, the journal still tells that it is of another line.
            with contextlib.suppress(OSError):
                path.rename(free_name(path.with_name(f"{ABANDONED}{self.line}-{path.name}")))
            self._candidates = [p for p in self._candidates if p != path]


class Untrustworthy(Exception):
    """A candidate that is not what was written."""


def look_and_trust(path: Path, step: int) -> Path:
    """Mark a checkpoint as trusted if it is whole. Raises Untrustworthy, OSError."""
    faults = checkpoint.faults_of(path)
    if faults:
        raise Untrustworthy("; ".join(faults))
    checkpoint.trust(path, step)
    return path


def _discard(path: Path) -> None:
    """Remove a checkpoint; where the disk does not let us it stays, and is tried again at the next rotation."""
    with contextlib.suppress(OSError):
        remove_folder(path)


def free_name(path: Path) -> Path:
    """``path``, numbered where something stands there already."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def step_in(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name[len(checkpoint.PREFIX) :])
