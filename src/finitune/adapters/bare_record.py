"""The training state of a bare loop that is neither tensors nor the optimizer's own: one record."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finitune.core.robust import History
from finitune.core.types import Reading
from finitune.engine.conditions import AS_CONFIGURED, Conditions

SCHEMA = 1
_MOST_PADDING = 1 << 16


@dataclass(slots=True)
class BareState:
    """Where a bare run stands."""

    step: int = 0
    """Batches used up, committed or skipped."""
    updates: int = 0
    """Committed steps."""
    attempt: int = 0
    """Transactions made."""
    clean_steps: int = 0
    """Committed steps in a row in which nothing worth a warning was found."""
    loss_sum: float = 0.0
    """Sum of the losses of committed steps (all finite)."""
    history: History = field(default_factory=History)
    movement: tuple[float, float] | None = None
    """(update ratio, changed fraction) of the last commit, where it was measured."""
    guard: dict[str, Any] = field(default_factory=dict)
    """What the guard remembers (incidents, probation): JSON-able."""
    conditions: Conditions = AS_CONFIGURED
    clipper: dict[str, Any] = field(default_factory=dict)
    """What the adaptive clipper in force remembers; empty without one."""

    def committed(self, reading: Reading) -> None:
        """Count a committed step."""
        self.history.commit(reading)
        self.updates += 1
        self.loss_sum += reading.loss
        self.step += 1

    def record(self) -> dict[str, Any]:
        """JSON-able record; floats survive exactly."""
        return {
            "schema": SCHEMA,
            "step": self.step,
            "updates": self.updates,
            "attempt": self.attempt,
            "clean_steps": self.clean_steps,
            "loss_sum": self.loss_sum,
            "movement": list(self.movement) if self.movement else None,
            "guard": copy.deepcopy(self.guard),
            "conditions": self.conditions.to_json(),
            "clipper": copy.deepcopy(self.clipper),
            "history": self.history.state(),
        }

    def load(self, record: Mapping[str, Any]) -> None:
        """Restore what :meth:`record` gave. Raises KeyError or ValueError for a foreign record."""
        if record["schema"] != SCHEMA:
            raise ValueError(f"training state of schema {record['schema']}, expected {SCHEMA}")
        movement = record["movement"]
        self.conditions = conditions_of(record)
        self.step, self.updates = int(record["step"]), int(record["updates"])
        self.attempt, self.clean_steps = int(record["attempt"]), int(record["clean_steps"])
        self.loss_sum = float(record["loss_sum"])
        self.movement = (float(movement[0]), float(movement[1])) if movement else None
        self.guard, self.clipper = copy.deepcopy(dict(record["guard"])), copy.deepcopy(dict(record["clipper"]))
        self.history.load(record["history"])


def conditions_of(record: Mapping[str, Any]) -> Conditions:
    """The conditions of a state's record. Raises KeyError or ValueError where it has none that can be."""
    found = Conditions.from_json(record["conditions"])
    _check(found)
    # One object for "as configured": asking whether anything is changed costs nothing then.
    return AS_CONFIGURED if found == AS_CONFIGURED else found


def _check(found: Conditions) -> None:
    """Raise ValueError for values of another kind than they have to be: the record may be a stranger's."""
    texts, numbers = (str, type(None)), (int, float, type(None))
    kinds: dict[str, tuple[type, ...]] = {
        "precision": texts,
        "attention": texts,
        "clipper": texts,
        "loss_scale": numbers,
        "min_scale": numbers,
        "max_scale": numbers,
        "max_grad_norm": numbers,
        "adam_eps": numbers,
        "lr_factor": (int, float),
        "max_lr": numbers,
        "warmup_from_update": (int, type(None)),
        "warmup_steps": (int,),
        "extra_padding": (int,),
    }
    wrong = [name for name, kind in kinds.items() if not isinstance(getattr(found, name), kind)]
    for name in ("fp32_modules", "quarantine"):
        values = getattr(found, name)
        if not isinstance(values, tuple) or not all(isinstance(v, str) for v in values):
            wrong.append(name)
    if wrong or abs(found.extra_padding) > _MOST_PADDING:
        raise ValueError(f"conditions: {(wrong or ['extra_padding'])[0]} cannot be")
