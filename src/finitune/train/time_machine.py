"""The run's time machine: snapshots, journalled digests, and the way back to any step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from finitune.core import journal as journals
from finitune.core.journal import Journal
from finitune.core.types import Finding
from finitune.core.units import bytes_text
from finitune.engine.codes_time import NO_SNAPSHOTS
from finitune.engine.line import line_of
from finitune.engine.snapshot import Buffers, Snapshot, is_out_of_memory
from finitune.engine.timeline import Arrival, Base, Timeline
from finitune.numerics.fingerprint import fingerprint
from finitune.train import checkpoint
from finitune.train.loop import record_or_halt
from finitune.train.origin import Origin
from finitune.train.prepare import Prepared


class TimeMachine:
    """Keeps states of one run as it goes, and goes back to them."""

    def __init__(self, prepared: Prepared, journal: Journal, run_dir: Path) -> None:
        self.prepared, self.journal, self.run_dir = prepared, journal, run_dir
        self.port = prepared.port
        self.ring = prepared.snapshots.ring(prepared.recipe)
        self.timeline = Timeline(self.port, self._records, self.ring, self._stored, journal=str(journal.path))
        self.shadow: Snapshot | None = None
        """The state before the step at hand, where the recipe asks for it."""
        self._said = False
        self.digest_s = 0.0
        """Seconds spent on journalled digests."""
        self._shadow_buffers = Buffers() if prepared.snapshots.shadow else None

    def after_step(self, step_s: float) -> list[Finding]:
        """Take the snapshot and journal the digest that are due; ``step_s``: what a step takes on the average."""
        state, findings = self.port.state, []
        snapshot = None
        if self.ring.due(state.step):
            snapshot = self.ring.take(self.port, step_s)
            if snapshot is None:
                findings.append(self._out_of_memory())
        if state.step % self.prepared.recipe.snapshots.digest_steps == 0:
            self._journal_digest(snapshot)
        if self._shadow_buffers is not None and not self._take_shadow(self._shadow_buffers):
            findings.append(self._out_of_memory())
        return [f for f in findings if self._first_time(f)]

    def _take_shadow(self, buffers: Buffers) -> bool:
        """Copy the state before the next step; False, and never again, where there is no memory for it."""
        self.shadow = None
        try:
            self.shadow = buffers.take(self.port)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self._shadow_buffers = None
        return self.shadow is not None

    def _first_time(self, _finding: Finding) -> bool:
        """A lack of memory is said once."""
        first, self._said = not self._said, True
        return first

    def _journal_digest(self, snapshot: Snapshot | None) -> None:
        started_s = time.perf_counter()
        state = self.port.state
        mark = snapshot.mark if snapshot else fingerprint(self.port.state_tensors(), self.port.state_record())
        total = self.prepared.plan.total_steps
        facts = {"step": state.step, "attempt": state.attempt, "total_steps": total}
        record_or_halt(self.journal, "state", **facts, mark=mark.to_json())
        self.digest_s += time.perf_counter() - started_s

    def _out_of_memory(self) -> Finding:
        planned = self.prepared.snapshots
        share = self.prepared.recipe.snapshots.memory_share
        size, budget = bytes_text(planned.snapshot_bytes), bytes_text(planned.budget_bytes)
        return NO_SNAPSHOTS.find("", needed=size, budget=budget, free="?", share=share)

    def _records(self) -> Iterator[Mapping[str, Any]]:
        """What the journal holds, and what the disk has not taken yet."""
        return chain(journals.read(self.journal.path), self.journal.waiting())

    def _stored(self) -> Iterator[Base]:
        """States outside of the ring: the shadow, checkpoints, and the start of the run."""
        if self.shadow is not None:
            yield self.shadow
        rollbacks = line_of(self._records()).rollbacks
        yield from checkpoint.bases(self.run_dir, rollbacks, self.port.parts)
        yield Origin(self.prepared.recipe)

    def state_at(self, step: int) -> Snapshot:
        """A copy of the state after ``step`` batches; the run's state stays. Raises Unreachable."""
        return self.timeline.state_at(step)

    def roll_back(self, step: int, reason: str) -> Arrival:
        """Make the state after ``step`` batches the run's state, journalled before it counts.

        What came after it is of another line from now on: the caller lets its keeper abandon those checkpoints.
        Raises Unreachable with nothing changed, Halted where the journal cannot be written.
        """
        was = self.port.state.step
        arrival = self.timeline.go_to(step)
        attempt = self.port.state.attempt
        record_or_halt(
            self.journal,
            "rollback",
            from_step=was,
            to_step=step,
            attempt=attempt,
            reason=reason,
            base=arrival.base_step,
        )
        self.ring.forget_after(attempt)
        self.shadow = None
        return arrival
