"""What goes wrong in a run in which every number looks healthy: the update's direction, and what the loss means.

Both looks are rare and exact (engine/update_check.py, engine/rescaled.py). What they find opens an incident, which
looks again by experiment before anything is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from finitune.core.types import Finding, Judgement
from finitune.engine.conditions import NotPossible
from finitune.engine.look.codes_update import LOSS_RESCALED
from finitune.engine.rescaled import LEAP_STEPS, Again, Past, before_the_leap, leapt, once_more, stand_at
from finitune.engine.snapshot import as_snapshot, is_out_of_memory
from finitune.engine.step import Outcome
from finitune.engine.update_check import UpdateCheck
from finitune.numerics.seeds import generators_kept

if TYPE_CHECKING:
    from finitune.engine.guard import Guard
    from finitune.engine.port import ReplayPort

_QUIET_STEPS, _LONGEST_QUIET_STEPS = 16, 512
"""After a suspicion that proved empty; twice as long each time."""
_LEVEL_STEPS = 64
"""Losses of before that say what is usual."""


class Silent:
    """The looks of one guard."""

    def __init__(self, port: ReplayPort) -> None:
        self.updates = UpdateCheck(port)
        self.looks_back = True
        """Compute a step of the past again where loss and gradient leap. Not on several ranks: all would have to."""
        self._quiet_until, self._wait = 0, _QUIET_STEPS

    def watched(self, transaction: Callable[[], Outcome]) -> Outcome:
        """The transaction, its update looked at where that is due."""
        with self.updates.watching():
            return transaction()

    def judged(self, guard: Guard, outcome: Outcome) -> Outcome:
        """With what was found; the state is sound and not settled yet."""
        outcome = self.updates.judged(outcome)
        step, history = outcome.reading.step, guard.port.state.history
        if not (outcome.committed and guard.able and self.looks_back) or step < self._quiet_until or not leapt(history):
            return outcome
        found = _rescaled(guard, step)
        if found is None:
            self._quiet_until, self._wait = step + self._wait, min(2 * self._wait, _LONGEST_QUIET_STEPS)
            return outcome
        was = outcome.judgement
        self._quiet_until = step + _LONGEST_QUIET_STEPS
        return replace(outcome, judgement=Judgement(was.verdict, (*was.findings, found)))


def known_past(guard: Guard) -> list[Past]:
    """Steps whose state of before is in memory, newest first."""
    if guard.timeline is None:
        return []
    try:
        return Past.of(guard.timeline.records(), [s.step for s in guard.timeline.ring.taken])
    except OSError:  # a journal that cannot be read tells nothing
        return []


def _rescaled(guard: Guard, step: int) -> Finding | None:
    """OPT121 where a step of before the leap has another loss now, by the number of micro-batches."""
    try:
        again = _once_more(guard, step)
    except (NotPossible, OSError, KeyError, ValueError):
        return None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    if again is None or not again.by_micros:
        return None
    numbers = again.numbers() | {"loss": _level_now(guard, again.factor), "since": step - LEAP_STEPS + 1}
    return LOSS_RESCALED.find("loss_fn", step=step, fault_class="L", **numbers)


def _level_now(guard: Guard, factor: float) -> float:
    """The highest loss of the steps before the leap, as it would come out now."""
    before = guard.port.state.history.log_loss.tail(LEAP_STEPS + _LEVEL_STEPS)[:-LEAP_STEPS]
    return math.exp(max(before)) * factor


def _once_more(guard: Guard, step: int) -> Again | None:
    port, timeline = guard.port, guard.timeline
    past = before_the_leap(known_past(guard), step)
    if past is None or timeline is None:
        return None
    base = next(s for s in reversed(timeline.ring.taken) if s.step == past.base)
    present = as_snapshot(port)
    with generators_kept():
        try:
            stand_at(port, base)
            return once_more(port, past)
        finally:
            present.restore(port)
