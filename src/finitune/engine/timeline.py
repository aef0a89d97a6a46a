"""The timeline: the state of any step, from the nearest base and the journal.

state_at(step) = nearest base at or before it       a snapshot in memory, a checkpoint, the start of the run
               + redo of the journalled transactions after that base, in order:
                   committed   computed again; loss, gradient norm, rate and scale must have the journalled bits
                   given up    not computed: the cursor moves on
                   retried     not computed: the loss scale moves
               + the journalled treatments between them: the same operations, the same conditions
               + the state's fingerprint compared with every journalled one on the way

A difference is a finding of its own: a step that does not repeat was made by a race, by the hardware or by
randomness that nobody seeds, and neither data nor learning rate may be blamed for it.
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from finitune.core.types import Finding, Reading
from finitune.engine.codes_time import BASE_DAMAGED, NOT_REPRODUCED, STEP_UNREACHABLE
from finitune.engine.conditions import NotPossible
from finitune.engine.line import Change, Event, Line, line_of, treated
from finitune.engine.mend import mend
from finitune.engine.monitor import read
from finitune.engine.policy import Action
from finitune.engine.port import Port, ReplayPort
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
        port: ReplayPort,
        records: Callable[[], Iterable[Mapping[str, Any]]],
        ring: SnapshotRing,
        stored: Callable[[], Iterable[Base]] = tuple,
        *,
        journal: str = "-",
    ) -> None:
        self.port, self.ring = port, ring
        self.records = records
        """All journal records of the run, also those that the disk has not taken yet. May raise OSError."""
        self.stored = stored
        """Bases outside of the ring."""
        self.journal = journal
        """Where the records lie, for messages."""

    def state_at(self, step: int) -> Snapshot:
        """A copy of the state after ``step`` batches; the port stays as it is, bit for bit. Raises Unreachable.

        It is the state as the next step found it: treatments right after the batch was used up are in it.
        """
        present = as_snapshot(self.port)
        try:
            self._travel(step)
            return as_snapshot(self.port)
        finally:
            present.restore(self.port)

    def go_to(self, step: int) -> Arrival:
        """Make the state after ``step`` batches the training state. Raises Unreachable with nothing changed."""
        return self._moved(lambda: self._travel(step))

    def undo(self) -> Arrival:
        """Make the state before the transaction at hand, which is not settled yet, the training state.

        For an update that spoilt the state. Raises Unreachable with nothing changed.
        """
        record = self.port.state_record()
        attempt, step = int(record["attempt"]), int(record["step"])
        return self._moved(lambda: self._travel_to(self._line(step), attempt, step))

    def _moved(self, travel: Callable[[], Arrival]) -> Arrival:
        present = as_snapshot(self.port)
        try:
            return travel()
        except BaseException:
            present.restore(self.port)
            raise

    def _travel(self, step: int) -> Arrival:
        line = self._line(step)
        target = line.attempt_of(step)
        if target is None:
            raise Unreachable(self._unreachable(step, "the journal does not know this step"))
        return self._travel_to(line, target, step)

    def _line(self, step: int) -> Line:
        try:
            return line_of(self.records())
        except OSError as error:
            raise Unreachable(self._unreachable(step, str(error))) from error

    @torch.enable_grad()
    def _travel_to(self, line: Line, target: int, step: int) -> Arrival:
        """Restore the nearest base and go on from there. May be asked by whoever computes without gradients."""
        findings: list[Finding] = []
        for base in self._bases(target):
            if line.path(base.attempt, target) is None:
                continue
            if not self._restored(base):
                findings.append(BASE_DAMAGED.find(f"step {base.step}", step=base.step))
                continue
            done = line.done(base.attempt, treated(self.port.state_record()))
            path = line.path(base.attempt, target, done)
            if path is None:
                continue
            self._change(line, base.attempt, done)
            for event in path:
                self._redo(event)
                self._change(line, event.attempt, 0)
            num_redone = sum(e.action is Action.PROCEED for e in path)
            return Arrival(int(self.port.state_record()["step"]), base.step, num_redone, tuple(findings))
        reason = "; ".join([_NO_WAY, *(f.where for f in findings)])
        raise Unreachable(self._unreachable(step, reason))

    def _change(self, line: Line, attempt: int, done: int) -> None:
        """Make the changes after ``attempt`` that are not made yet; compare the state where it was journalled."""
        changes = line.changes.get(attempt, [])
        for made in range(done, len(changes) + 1):
            if attempt in line.marks and line.marked.get(attempt, 0) == made:
                compare(self.port, line.marks[attempt], attempt)
            if made < len(changes):
                self._make(changes[made])

    def _redo(self, event: Event) -> None:
        try:
            redo(self.port, event)
        except NotPossible as error:
            self.port.abort()
            step = event.reading.step
            raise Unreachable(self._unreachable(step, f"its batch cannot be had any more: {error}")) from error

    def _make(self, change: Change) -> None:
        try:
            make(self.port, change, self._copy_at)
        except (NotPossible, KeyError) as error:
            step = int(self.port.state_record()["step"])
            raise Unreachable(self._unreachable(step, f"a treatment cannot be done again: {error}")) from error

    def _copy_at(self, step: int) -> Snapshot | None:
        try:
            return self.state_at(step)
        except Unreachable:
            return None

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

    def _unreachable(self, step: int, reason: str) -> Finding:
        return STEP_UNREACHABLE.find(f"step {step}", step=step, reason=reason, journal=self.journal)


def make(port: ReplayPort, change: Change, state_at: Callable[[int], Snapshot | None]) -> None:
    """Do a journalled treatment again. Raises NotPossible, or KeyError for a tensor that is not there."""
    mend(port, change.mends, state_at)
    port.adopt(change.conditions)
    if change.guard is not None:
        port.state.guard = copy.deepcopy(dict(change.guard))


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
