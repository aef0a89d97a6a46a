"""The line: which transactions, as the journal tells them, led from the start of a run to where it stands.

A journal holds more than one line where a run went back: a *resume* or a *rollback* record says to which transaction,
and what was journalled after that one no longer counts. Transactions are numbered by ``attempt``; a step that was
tried again at smaller loss scales has several, and the last of them used the batch up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from finitune.core.journal import number
from finitune.core.types import Reading, Severity
from finitune.engine.policy import Action

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
        return self.action is not Action.RETRY_SMALLER_SCALE


@dataclass(slots=True)
class Line:
    """The transactions that count, and the journalled state digests among them."""

    events: dict[int, Event] = field(default_factory=dict)
    """By attempt."""
    marks: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    """Fingerprint records by the attempt they were taken after."""
    rollbacks: list[int] = field(default_factory=list)
    """The step that each rollback went to, in order."""
    wall: int = 0
    """The transaction at which the run last went on under other settings: what was done before it cannot be redone."""

    def cut(self, attempt: int) -> None:
        """Forget what came after ``attempt``."""
        self.events = {a: e for a, e in self.events.items() if a <= attempt}
        self.marks = {a: m for a, m in self.marks.items() if a <= attempt}
        self.wall = min(self.wall, attempt)

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

    def path(self, after: int, to: int) -> list[Event] | None:
        """The events after one transaction up to another; None where the journal has a gap or a wall there."""
        if after < min(self.wall, to):
            return None
        found = [self.events.get(a) for a in range(after + 1, to + 1)]
        events = [e for e in found if e is not None]
        return events if len(events) == len(found) else None


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
                    line.marks[int(record["attempt"])] = record["mark"]
            elif kind == "resume":
                attempt, changed = int(record["attempt"]), _changed(record)
                line.cut(attempt)
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


def _severities(findings: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    return (str(f["severity"]) for f in findings)
