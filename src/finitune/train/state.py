"""The training state that is not tensors: one record, saved and digested as a whole."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finitune.core.robust import History
from finitune.data.loader import Cursor
from finitune.engine.conditions import AS_CONFIGURED, Conditions
from finitune.engine.scaler import LossScaler

SCHEMA = 3
_WITHOUT_CONDITIONS = 2
"""The schema before: everything is as configured."""


@dataclass(slots=True)
class RunState:
    """Where a run stands."""

    cursor: Cursor = field(default_factory=Cursor)
    """The next batch to train on."""
    step: int = 0
    """Batches used up, committed or skipped."""
    updates: int = 0
    """Committed steps: what the LR schedule counts."""
    attempt: int = 0
    """Transactions made: steps, and tries of a step at smaller loss scales."""
    clean_steps: int = 0
    """Committed steps in a row in which nothing worth a warning was found."""
    supervised_tokens: int = 0
    history: History = field(default_factory=History)
    scaler: LossScaler | None = None
    loss_sum: float = 0.0
    """Sum of the mean losses of committed steps (all finite)."""
    movement: tuple[float, float] | None = None
    """(update ratio, changed fraction) of the last commit, where it was measured."""
    guard: dict[str, Any] = field(default_factory=dict)
    """What the guard remembers beyond the statistics (incidents, probation): JSON-able."""
    conditions: Conditions = AS_CONFIGURED
    """What is not as configured: the cures that are in force."""
    clipper: dict[str, Any] = field(default_factory=dict)
    """What the adaptive clipper in force remembers; empty without one."""

    def record(self) -> dict[str, Any]:
        """JSON-able record; floats survive exactly."""
        return {
            "schema": SCHEMA,
            "cursor": self.cursor.to_json(),
            "step": self.step,
            "updates": self.updates,
            "attempt": self.attempt,
            "clean_steps": self.clean_steps,
            "supervised_tokens": self.supervised_tokens,
            "loss_sum": self.loss_sum,
            "movement": list(self.movement) if self.movement else None,
            "guard": copy.deepcopy(self.guard),
            "conditions": self.conditions.to_json(),
            "clipper": copy.deepcopy(self.clipper),
            "history": self.history.state(),
            "scaler": self.scaler.state() if self.scaler else None,
        }

    def check(self, record: Mapping[str, Any]) -> None:
        """Raise what :meth:`load` would raise, with nothing changed."""
        RunState(scaler=LossScaler(self.scaler.settings) if self.scaler is not None else None).load(record)

    def load(self, record: Mapping[str, Any]) -> None:
        """Restore what :meth:`record` gave. Raises KeyError or ValueError for a foreign record."""
        if record["schema"] not in (SCHEMA, _WITHOUT_CONDITIONS):
            raise ValueError(f"training state of schema {record['schema']}, expected {SCHEMA}")
        conditions = conditions_of(record)
        clipper = copy.deepcopy(dict(record["clipper"])) if record["schema"] == SCHEMA else {}
        self.cursor = Cursor.from_json(record["cursor"])
        self.step = int(record["step"])
        self.updates = int(record["updates"])
        self.attempt = int(record["attempt"])
        self.clean_steps = int(record["clean_steps"])
        self.guard = copy.deepcopy(dict(record["guard"]))
        self.supervised_tokens = int(record["supervised_tokens"])
        self.loss_sum = float(record["loss_sum"])
        self.movement = (float(record["movement"][0]), float(record["movement"][1])) if record["movement"] else None
        self.history.load(record["history"])
        if self.scaler is not None and record["scaler"] is not None:
            self.scaler.load(record["scaler"])
        self.conditions, self.clipper = conditions, clipper


def conditions_of(record: Mapping[str, Any]) -> Conditions:
    """The conditions of a state's record. Raises KeyError or ValueError where it has none that can be."""
    if record["schema"] == _WITHOUT_CONDITIONS:
        return AS_CONFIGURED
    found = Conditions.from_json(record["conditions"])
    # One object for "as configured": asking whether anything is changed costs nothing then.
    return AS_CONFIGURED if found == AS_CONFIGURED else found
