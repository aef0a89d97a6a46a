"""The lab: the failing step is computed again here, one condition changed at a time, and no trace is left.

The port stands at the state before the failing step whenever an experiment begins, and again when it ends: state,
conditions, gradients and global generators. What an experiment costs is counted in replays (one forward and backward
of the step) and charged to a budget.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from finitune.core.incident import Trigger
from finitune.core.types import Reading
from finitune.engine.case import Case
from finitune.engine.conditions import Conditions
from finitune.engine.mend import mend
from finitune.engine.monitor import read
from finitune.engine.plan import Mend
from finitune.engine.policy import Action, is_scale_overflow
from finitune.engine.port import WHOLE, Ask, ReplayPort
from finitune.engine.snapshot import Snapshot
from finitune.numerics.seeds import generators_kept
from finitune.numerics.statecheck import ABSURD, bad_tensors

# Memory for copies of earlier states during one investigation; at least one is kept.
_STATES_BYTES = 2 * 2**30


class BudgetSpent(Exception):
    """No replay is left for this incident."""


@dataclass(slots=True)
class Budget:
    """How much an incident may cost."""

    max_replays: float
    max_s: float
    replays: float = 0.0
    started_s: float = field(default_factory=time.perf_counter)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the incident began."""
        return time.perf_counter() - self.started_s

    def left(self, replays: float = 1.0) -> bool:
        """Whether ``replays`` more are affordable."""
        return self.replays + replays <= self.max_replays and self.elapsed_s < self.max_s

    def charge(self, replays: float) -> None:
        """Count replays. Raises BudgetSpent where they are not affordable."""
        if not self.left(replays):
            raise BudgetSpent
        self.replays += replays


@dataclass(frozen=True, slots=True)
class Shot:
    """What one computation of a step came to."""

    reading: Reading
    bad: bool
    bad_state: tuple[str, ...] = ()
    """State tensors that the update made non-finite; empty where no update was made."""


class Lab:
    """Computes the failing step again under changed conditions."""

    def __init__(
        self,
        port: ReplayPort,
        case: Case,
        before: Snapshot,
        budget: Budget,
        state_at: Callable[[int], Snapshot | None],
    ) -> None:
        self.port, self.case, self.before, self.budget = port, case, before, budget
        self.now = port.conditions
        """The conditions in force when the step failed."""
        self._bad_before = frozenset(bad_tensors(before.tensors.items(), ABSURD))
        self._state_at = state_at
        self._states: dict[int, Snapshot | None] = {before.step: before}
        self.walked: dict[tuple[int, Conditions, tuple[int | None, ...]], tuple[Shot, ...]] = {}
        """Courses that were made without mends or skips, by the step they start at, conditions and batches."""

    @property
    def step(self) -> int:
        """1-based number of the failing step."""
        return self.before.step + 1

    # -- one step ---------------------------------------------------------------------------------------------

    def shoot(self, conditions: Conditions | None = None, ask: Ask = WHOLE) -> Shot:
        """The failing step (or the batch that is asked for) once, on the port's present state.

        Where the failure is one of the update, the update is made and undone. Raises NotPossible, BudgetSpent.
        """
        self.budget.charge(1.0)
        with self.under(conditions):
            if self.case.trigger is Trigger.UPDATE:
                return self._with_update(ask)
            try:
                reading = read(self.port.forward_backward(ask))
            finally:
                self.port.abort()
            return Shot(reading, self.case.is_bad(reading))

    def _with_update(self, ask: Ask) -> Shot:
        reading = read(self.port.forward_backward(ask))
        if self.case.is_bad(reading):
            self.port.abort()
            return Shot(reading, True)
        self.port.commit(reading)
        bad = self._made_bad()
        self.restore(self.before)
        return Shot(reading, bool(bad), bad)

    def _made_bad(self) -> tuple[str, ...]:
        """State tensors that are not finite (or absurdly large) now and were sound before the failing step."""
        return tuple(n for n in bad_tensors(self.port.state_tensors(), ABSURD) if n not in self._bad_before)

    @contextmanager
    def under(self, conditions: Conditions | None) -> Iterator[None]:
        """Inside, these conditions are in force; afterwards those of before. Raises NotPossible."""
        was = self.port.conditions
        if conditions is None or conditions == was:
            yield
            return
        self.port.adopt(conditions)
        try:
            yield
        finally:
            self.port.abort()
            self.port.adopt(was)

    # -- several steps ----------------------------------------------------------------------------------------

    def state_at(self, step: int) -> Snapshot | None:
        """A copy of the state after ``step`` batches; None where it cannot be had. The port stays as it is."""
        if step not in self._states:
            self._states[step] = self._state_at(step) if step >= 0 else None
            self._forget_some()
        return self._states[step]

    def _forget_some(self) -> None:
        """Copies of a large model's state are not kept for long; that of before the failing step stays."""
        kept = [s for s, held in self._states.items() if held is not None and held is not self.before]
        most = max(1, _STATES_BYTES // max(1, self.before.num_bytes))
        for old in kept[: max(0, len(kept) - most)]:
            del self._states[old]

    @contextmanager
    def standing_at(self, snapshot: Snapshot) -> Iterator[None]:
        """Inside, the port has this state; afterwards that of before the failing step."""
        try:
            self.restore(snapshot)
            yield
        finally:
            self.restore(self.before)

    def restore(self, snapshot: Snapshot) -> None:
        """Make a snapshot the port's state."""
        snapshot.restore(self.port)

    def course(
        self,
        start: Snapshot,
        conditions: Conditions,
        steps: Sequence[int | None],
        *,
        mends: Sequence[Mend] = (),
        tolerant: bool = False,
        skip_at: int | None = None,
    ) -> list[Shot]:
        """Train from ``start`` on, under ``conditions``, one update for each entry of ``steps``; then undo it all.

        ``steps``: None is the batch at the cursor (so ``[None] * n`` goes on as the run would), a number the batch of
        that step. Ends early, without that update, at a step that is bad. ``tolerant``: only what is not finite counts
        as bad. ``skip_at``: the batch at hand when so many are used up is given up. Raises NotPossible, BudgetSpent.
        """
        shots: list[Shot] = []
        with generators_kept(), self.standing_at(start):
            mend(self.port, mends, self.state_at)
            self.port.adopt(conditions)
            for step in steps:
                if skip_at is not None and self.port.state.step == skip_at:
                    self.port.settle(Action.SKIP_BATCH, self.case.reading, clean=False)
                shot = self._train_one(step, tolerant=tolerant)
                shots.append(shot)
                if shot.bad:
                    break
        if not mends and skip_at is None:
            self.walked[start.step, conditions, tuple(steps)] = tuple(shots)
        return shots

    def _train_one(self, step: int | None, *, tolerant: bool) -> Shot:
        reading = self._read_at_a_scale_that_fits(Ask(step=step))
        finite = math.isfinite(reading.loss) and math.isfinite(reading.grad_norm)
        if not finite or not (tolerant or not self.case.is_bad(reading)):
            self.port.abort()
            return Shot(reading, True)
        self.port.commit(reading)
        self.port.settle(Action.PROCEED, reading, clean=True)
        bad = self._made_bad()
        return Shot(reading, bool(bad), bad)

    def _read_at_a_scale_that_fits(self, ask: Ask) -> Reading:
        """As a run does: an overflow under a loss scale is answered by a smaller scale, as long as there is one."""
        while True:
            self.budget.charge(1.0)
            reading = read(self.port.forward_backward(ask))
            if not (is_scale_overflow(reading) and self.port.scale_left):
                return reading
            self.port.abort()
            self.port.settle(Action.RETRY_SMALLER_SCALE, reading, clean=False)

    def losses_of(self, steps: Sequence[int]) -> list[float]:
        """Losses of the batches of other steps on the port's present state. Raises NotPossible, BudgetSpent."""
        losses = []
        for step in steps:
            self.budget.charge(1.0)
            try:
                losses.append(read(self.port.forward_backward(Ask(step=step))).loss)
            finally:
                self.port.abort()
        return losses


def largest(tensors: Sequence[torch.Tensor]) -> float:
    """Largest magnitude over floating tensors; NaN where one holds a NaN, 0.0 for none."""
    peaks: list[Any] = [torch.stack(torch.aminmax(t.detach())).float().abs().amax() for t in tensors if t.numel()]
    return float(torch.stack([p.cpu() for p in peaks]).amax()) if peaks else 0.0
