"""The line: which transactions, as the journal tells them, led from the start of a run to where it stands.

A journal holds more than one line where a run went back: a *resume* or a *rollback* record says to which transaction,
and what was journalled after that one no longer counts. Transactions are numbered by ``attempt``; a step that was
tried again at smaller loss scales has several, and the last of them used the batch up.

Between two transactions a *treatment* may have changed the state: operations on tensors, other conditions, what the
guard remembers. It belongs to the place right after the transaction that it names. A state of that place may have been
kept before or after it; ``treated`` tells which.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from finitune.core.journal import encode, number
from finitune.core.types import Reading, Severity
from finitune.engine.conditions import Conditions
from finitune.engine.plan import Mend, Operation
from finitune.engine.policy import Action

# Actions after which the same batch is computed again.
_AGAIN = (Action.RETRY_SMALLER_SCALE, Action.TREAT)
_HARMLESS = "harmless"
_GRAVE = (Severity.WARNING.value, Severity.ERROR.value)


@dataclass(frozen=True, slots=True)
class Event:
    """One transaction as it was journalled."""

    attempt: int
    reading: Reading
    """Only step, loss, gradient norm, learning rate and loss scale."""
    action: Action
    clean: bool

    @property
    def uses_batch(self) -> bool:
        """The batch was committed or given up: the step was over."""
        return self.action not in _AGAIN


@dataclass(frozen=True, slots=True)
class Change:
    """One treatment as it was journalled: what was done to the state right after a transaction."""

    attempt: int
    conditions: Conditions
    """In force from here on."""
    mends: tuple[Mend, ...] = ()
    redo: bool = True
    """It can be done again from the journal alone."""
    guard: Mapping[str, Any] | None = None
    """What the guard remembers from here on; None: as before."""

    @property
    def treated(self) -> str:
        """See :func:`treated`."""
        return treated({"conditions": self.conditions.to_json(), "guard": self.guard or {}})


def treated(record: Mapping[str, Any]) -> str:
    """What a state's record says of treatments, in 12 hex digits: conditions and the guard's memory.

    It tells states from before and after a treatment apart that stand after the same transaction.
    """
    told = {"conditions": record.get("conditions", {}), "guard": record.get("guard", {})}
    text = json.dumps(encode(told), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


@dataclass(slots=True)
class Line:
    """The transactions that count, the treatments between them, and the journalled state digests."""

    events: dict[int, Event] = field(default_factory=dict)
    """By attempt."""
    marks: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    """Fingerprint records by the attempt they were taken after."""
    marked: dict[int, int] = field(default_factory=dict)
    """How many of the changes there had been made already when a fingerprint was taken; by attempt."""
    changes: dict[int, list[Change]] = field(default_factory=dict)
    """Treatments by the attempt they came after, in order."""
    rollbacks: list[int] = field(default_factory=list)
    """The step that each rollback went to, in order."""
    wall: int = 0
    """The transaction at which the run last went on under other settings: what was done before it cannot be redone."""

    def cut(self, attempt: int) -> None:
        """Forget what came after ``attempt``."""
        self.events = {a: e for a, e in self.events.items() if a <= attempt}
        self.marks = {a: m for a, m in self.marks.items() if a <= attempt}
        self.marked = {a: n for a, n in self.marked.items() if a <= attempt}
        self.changes = {a: c for a, c in self.changes.items() if a <= attempt}
        self.wall = min(self.wall, attempt)

    def cut_untreated(self, attempt: int, now: str) -> None:
        """Forget those treatments after ``attempt`` that a state from there does not have yet; see :func:`treated`."""
        if attempt not in self.changes:
            return
        done = self.done(attempt, now)
        self.changes[attempt] = self.changes[attempt][:done]
        if not done:
            del self.changes[attempt]
        if self.marked.get(attempt, 0) > done:
            del self.marks[attempt], self.marked[attempt]

    def done(self, attempt: int, now: str) -> int:
        """How many of the changes after ``attempt`` a state has that stands there and is ``treated`` so."""
        changes = self.changes.get(attempt, ())
        return next((i for i in range(len(changes), 0, -1) if changes[i - 1].treated == now), 0)

    def change(self, change: Change) -> None:
        """A treatment. The guard's memory changes with treatments only: one that says nothing of it keeps it."""
        if change.guard is None and self.changes:
            latest = self.changes[max(self.changes)]
            change = replace(change, guard=latest[-1].guard)
        self.changes.setdefault(change.attempt, []).append(change)

    def mark(self, attempt: int, mark: Mapping[str, Any]) -> None:
        """A fingerprint of the state as it is there now."""
        self.marks[attempt] = mark
        self.marked[attempt] = len(self.changes.get(attempt, ()))

    def add(self, event: Event) -> None:
        """The next transaction. One whose number was there before tells that the run had gone back to before it."""
        if event.attempt in self.events:
            self.cut(event.attempt - 1)
        self.events[event.attempt] = event

    def attempt_of(self, step: int) -> int | None:
        """The transaction after which ``step`` batches were used up; None where the journal does not know it."""
        if step == 0:
            return 0
        return next((a for a, e in sorted(self.events.items()) if e.reading.step == step and e.uses_batch), None)

    def path(self, after: int, to: int, done: int | None = None) -> list[Event] | None:
        """The events after one transaction up to another.

        None where the journal has a gap or a wall there, or a change that cannot be done again. ``done``: how many of
        the changes right after the first are made already; by default all.
        """
        if after < min(self.wall, to):
            return None
        found = [self.events.get(a) for a in range(after + 1, to + 1)]
        events = [e for e in found if e is not None]
        open_changes = [c for a in range(after + 1, to + 1) for c in self.changes.get(a, ())]
        if done is not None:
            open_changes += self.changes.get(after, [])[done:]
        passable = len(events) == len(found) and all(c.redo for c in open_changes)
        return events if passable else None


def is_clean(action: Action, severities: Iterable[str]) -> bool:
    """Whether a transaction was committed with nothing found that is worth a warning."""
    return action is Action.PROCEED and not any(s in _GRAVE for s in severities)


def line_of(records: Iterable[Mapping[str, Any]]) -> Line:
    """The line that a journal's records tell. Records that lack what they should have are left out: a gap."""
    line = Line()
    for record in records:
        kind = record.get("kind")
        try:
            if kind == "step":
                line.add(event_of(record))
            elif kind == "state":
                if isinstance(record["mark"], Mapping):
                    line.mark(int(record["attempt"]), record["mark"])
            elif kind == "treatment":
                line.change(change_of(record))
            elif kind == "resume":
                attempt, changed = int(record["attempt"]), _changed(record)
                line.cut(attempt)
                if "treated" in record:
                    line.cut_untreated(attempt, str(record["treated"]))
                line.wall = attempt if changed else line.wall
            elif kind == "rollback":
                attempt, to_step = int(record["attempt"]), int(record["to_step"])
                line.cut(attempt)
                line.rollbacks.append(to_step)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
            continue
    return line


def _changed(record: Mapping[str, Any]) -> bool:
    """Whether a run went on with something that the numbers of a step may depend on."""
    changes = record.get("facts", {}).get("changes", ())
    return any(change.get("kind") != _HARMLESS for change in changes)


def event_of(record: Mapping[str, Any]) -> Event:
    """The transaction of a "step" record. Raises KeyError, TypeError or ValueError where it is not one."""
    action = Action(record["action"])
    scale = record.get("loss_scale")
    reading = Reading(
        step=int(record["step"]),
        loss=number(record["loss"]),
        grad_norm=number(record["grad_norm"]),
        lr=number(record["lr"]),
        loss_scale=None if scale is None else number(scale),
    )
    severities = _severities(record.get("findings", ()))
    return Event(int(record["attempt"]), reading, action, is_clean(action, severities))


def change_of(record: Mapping[str, Any]) -> Change:
    """The change of a "treatment" record. Raises KeyError, TypeError or ValueError where it is not one."""
    guard = record.get("guard")
    return Change(
        attempt=int(record["attempt"]),
        conditions=Conditions.from_json(record["conditions"]),
        mends=tuple(_mends(record.get("mends", ()))),
        redo=bool(record.get("redo", True)),
        guard=None if guard is None else copy.deepcopy(dict(guard)),
    )


def _mends(records: Sequence[Mapping[str, Any]]) -> Iterator[Mend]:
    for record in records:
        from_step = record.get("from_step")
        names = tuple(map(str, record["names"]))
        yield Mend(Operation(record["what"]), names, None if from_step is None else int(from_step))


def _severities(findings: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    return (str(f["severity"]) for f in findings)
