"""The timeline: the state of any step, from the nearest base and the journal.

state_at(step) = nearest base at or before it       a snapshot in memory, a checkpoint, the start of the run
               + redo of the journalled transactions after that base, in order:
                   committed   computed again; loss, gradient norm, rate and scale must have the journalled bits
                   given up    not computed: the cursor moves on
                   retried     not computed: the loss scale moves
               + the state's fingerprint compared with every journalled one on the way

A difference is a finding of its own: a step that does not repeat was made by a race, by the hardware or by
randomness that nobody seeds, and neither data nor learning rate may be blamed for it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from finitune.core import journal
from finitune.core.types import Finding, Reading
from finitune.engine.codes_time import BASE_DAMAGED, NOT_REPRODUCED, STEP_UNREACHABLE
from finitune.engine.line import Event, Line, line_of
from finitune.engine.monitor import read
from finitune.engine.policy import Action
from finitune.engine.port import Port
from finitune.engine.snapshot import Snapshot, SnapshotRing, as_snapshot
from finitune.numerics.fingerprint import fingerprint, first_difference

_NO_WAY = "no state before it is left, the journal has a gap, or settings were changed since"


class Base(Protocol):
    """A stored state: a snapshot, a checkpoint, the start of the run."""

    @property
    def step(self) -> int:
        """Batches used up."""
        ...

    @property
    def attempt(self) -> int:
        """Transactions made."""
        ...

    def intact(self) -> bool:
        """Whether it is still what was stored."""
        ...

    def restore(self, port: Port) -> None:
        """Make it the training state."""
        ...


class Unreachable(Exception):
    """The state of a step cannot be had; ``finding`` says why. The training state is as it was."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(f"{finding.code} {finding.where}")
        self.finding = finding


@dataclass(frozen=True, slots=True)
class Arrival:
    """How the state of a step was reached."""

    step: int
    base_step: int
    num_redone: int
    """Transactions computed again."""
    findings: tuple[Finding, ...] = ()
    """Bases that were passed over."""


class Timeline:
    """Moves a port along the line of its run."""

    def __init__(
        self,
        port: Port,
        journal_path: Path,
        ring: SnapshotRing,
        stored: Callable[[], Iterable[Base]] = tuple,
        waiting: Callable[[], Iterable[Mapping[str, Any]]] = tuple,
    ) -> None:
        self.port, self.journal_path, self.ring = port, journal_path, ring
        self.stored = stored
        """Bases outside of memory."""
        self.waiting = waiting
        """Records that the disk has not taken yet."""

    def state_at(self, step: int) -> Snapshot:
        """A copy of the state after ``step`` batches; the port stays as it is, bit for bit. Raises Unreachable."""
        present = as_snapshot(self.port)
        try:
            self._travel(step)
            return as_snapshot(self.port)
        finally:
            present.restore(self.port)

    def go_to(self, step: int) -> Arrival:
        """Make the state after ``step`` batches the training state. Raises Unreachable with nothing changed."""
        present = as_snapshot(self.port)
        try:
            return self._travel(step)
        except BaseException:
            present.restore(self.port)
            raise

    def _travel(self, step: int) -> Arrival:
        try:
            line = line_of(chain(journal.read(self.journal_path), self.waiting()))
        except OSError as error:
            raise Unreachable(self._unreachable(step, str(error))) from error
        target = line.attempt_of(step)
        if target is None:
            raise Unreachable(self._unreachable(step, "the journal does not know this step"))
        findings: list[Finding] = []
        for base in self._bases(target):
            path = line.path(base.attempt, target)
            if path is None:
                continue
            if not self._restored(base):
                findings.append(BASE_DAMAGED.find(f"step {base.step}", step=base.step))
                continue
            self._check(line, base.attempt)
            for event in path:
                redo(self.port, event)
                self._check(line, event.attempt)
            num_redone = sum(e.action is Action.PROCEED for e in path)
            return Arrival(step, base.step, num_redone, tuple(findings))
        reason = "; ".join([_NO_WAY, *(f.where for f in findings)])
        raise Unreachable(self._unreachable(step, reason))

    def _restored(self, base: Base) -> bool:
        """Whether the base is what was stored, and is the training state now."""
        try:
            if base.intact():
                base.restore(self.port)
                return True
        except Exception:  # noqa: BLE001  (whatever is wrong with one base, the next may be good)
            return False
        return False

    def _bases(self, target: int) -> list[Base]:
        """Nearest first; snapshots before what is stored at the same place."""
        known: list[Base] = [*reversed(self.ring.taken), *self.stored()]
        return sorted((b for b in known if b.attempt <= target), key=lambda b: -b.attempt)

    def _check(self, line: Line, attempt: int) -> None:
        """Compare the port's state with the journalled fingerprint, if there is one."""
        mark = line.marks.get(attempt)
        if mark is not None:
            compare(self.port, mark, attempt)

    def _unreachable(self, step: int, reason: str) -> Finding:
        return STEP_UNREACHABLE.find(f"step {step}", step=step, reason=reason, journal=str(self.journal_path))


def redo(port: Port, event: Event) -> None:
    """Do a journalled transaction again. Raises Unreachable where it does not come out as it did."""
    if event.action is Action.PROCEED:
        reading = read(port.forward_backward())
        different = _first_differing_number(event.reading, reading)
        if different is not None:
            port.abort()
            name, was, now = different
            where = f"step {reading.step}: {name}"
            raise Unreachable(NOT_REPRODUCED.find(where, step=reading.step, what=name, was=repr(was), now=repr(now)))
        port.commit(reading)
        port.settle(event.action, reading, clean=event.clean)
    else:
        port.settle(event.action, event.reading, clean=event.clean)


def _first_differing_number(was: Reading, now: Reading) -> tuple[str, Any, Any] | None:
    for name in ("step", "loss_scale", "lr", "loss", "grad_norm"):
        a, b = getattr(was, name), getattr(now, name)
        if a is None or b is None:
            if a is not b:
                return name, a, b
        elif struct.pack("<d", a) != struct.pack("<d", b):
            return name, a, b
    return None


def compare(port: Port, mark: Mapping[str, Any], attempt: int) -> None:
    """Raise Unreachable, naming the first differing tensor, where the port's state is not the journalled one."""
    record = port.state_record()
    different = first_difference(mark, fingerprint(port.state_tensors(), record))
    if different is not None:
        step = int(record["step"])
        was, now = f"{mark.get('digest')}", f"attempt {attempt}"
        raise Unreachable(NOT_REPRODUCED.find(f"step {step}: {different}", step=step, what=different, was=was, now=now))
