"""The way back to the first of some batches that were given up one after another while a loss scale was sought.

Giving a batch up changes no tensor: cursor, schedule, scale and counters move on. So the record of before the first of
them, with the tensors of now, is that earlier state. Nothing has to be computed again to get there, and no memory for a
copy is needed. A committed step ends it; the seal tells where tensors were changed in another way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finitune.engine.port import Port
from finitune.engine.snapshot import as_snapshot
from finitune.numerics.seal import Seal, seal


@dataclass(frozen=True, slots=True)
class BeforeSkips:
    """A base of the timeline: the record of then, the tensors of now."""

    port: Port
    record: dict[str, Any]
    seal: Seal

    @property
    def step(self) -> int:
        """Batches used up then."""
        return int(self.record["step"])

    @property
    def attempt(self) -> int:
        """Transactions made then."""
        return int(self.record["attempt"])

    def intact(self) -> bool:
        """Whether the tensors are still those of then."""
        return self.seal.holds(self.port.state_tensors(), self.record)

    def restore(self, port: Port) -> None:
        """Make it the training state. Raises KeyError or ValueError where the tensors do not fit."""
        port.restore(as_snapshot(port).tensors, self.record)


class Skips:
    """Remembers the record of before the first batch that is given up."""

    def __init__(self, port: Port) -> None:
        self.port = port
        self._first: BeforeSkips | None = None

    def note(self, num_skipped: int) -> None:
        """A batch is about to be given up, after ``num_skipped`` others in a row."""
        if num_skipped == 0:
            record = self.port.state_record()
            self._first = BeforeSkips(self.port, record, seal(self.port.state_tensors(), record))

    def bases(self) -> Iterator[BeforeSkips]:
        """The state of before the first one, as long as no update was made since."""
        first = self._first
        if first is None:
            return
        now = self.port.state_record()
        if now["updates"] == first.record["updates"] and int(now["attempt"]) >= first.attempt and first.intact():
            yield first
