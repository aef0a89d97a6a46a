"""Plans: what a remedy would do, as a value that can be tried on a replay, journalled and applied.

A plan is applied in this order: go back (``to_step``), mend tensors (``operations``), bring the conditions into force,
then deal with the batch at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from finitune.core.incident import Safety
from finitune.engine.conditions import Conditions


class BatchFate(str, Enum):
    """What happens to the batch that failed."""

    RETRY = "retry"
    """It is computed again, under the plan."""
    SKIP = "skip"
    """It is given up; its rows stay in the journal."""
    PASS = "pass"  # noqa: S105  (a fate, no password)
    """It is committed although a detector refused it: it is known to be harmless."""


class Operation(str, Enum):
    """What may be done to tensors of the training state."""

    RESET_MOMENTS = "reset_moments"
    """The optimizer's state of these parameters starts anew."""
    REPAIR = "repair"
    """The tensor takes its value from an earlier state or from the original model."""


@dataclass(frozen=True, slots=True)
class Mend:
    """One operation on named tensors."""

    what: Operation
    names: tuple[str, ...]
    """Parameters (``RESET_MOMENTS``), or state tensors and buffers (``REPAIR``)."""
    from_step: int | None = None
    """``REPAIR``: the step whose state holds the good value; None: the model that training began from."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a remedy would do."""

    remedy: str
    safety: Safety
    conditions: Conditions
    """In force afterwards; equal to the present ones where nothing about them changes."""
    to_step: int | None = None
    """Batches used up after going back; None: the failing step is only undone."""
    mends: tuple[Mend, ...] = ()
    fate: BatchFate = BatchFate.RETRY
    temporary: bool = False
    """Conditions are taken back after the probation, if the run is clean without them."""
    halts: bool = False
    """The run stops; nothing is applied."""
    data: Mapping[str, Any] | None = None
    """Numbers for the words of the remedy."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-able record."""
        return {
            "remedy": self.remedy,
            "safety": self.safety.value,
            "conditions": self.conditions.to_json(),
            "to_step": self.to_step,
            "mends": [{"what": m.what.value, "names": list(m.names), "from_step": m.from_step} for m in self.mends],
            "fate": self.fate.value,
            "temporary": self.temporary,
            "halts": self.halts,
            "data": dict(self.data or {}),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Plan:
        """Inverse of :meth:`to_json`."""
        return cls(
            remedy=str(record["remedy"]),
            safety=Safety(record["safety"]),
            conditions=Conditions.from_json(record["conditions"]),
            to_step=record["to_step"],
            mends=tuple(Mend(Operation(m["what"]), tuple(m["names"]), m["from_step"]) for m in record["mends"]),
            fate=BatchFate(record["fate"]),
            temporary=bool(record["temporary"]),
            halts=bool(record.get("halts", False)),
            data=dict(record.get("data", {})),
        )
