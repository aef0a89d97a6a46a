"""Courses: how the losses went, where their rise began, and the same batches once more under another condition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from finitune.core.incident import Trigger
from finitune.engine.case import Case
from finitune.engine.conditions import Conditions, NotPossible
from finitune.engine.experiments import _tools as tools
from finitune.engine.lab import Lab
from finitune.engine.prove import MAX_RISE, MIN_RISE_NATS, is_at_hand
from finitune.engine.snapshot import Snapshot

MIN_BACK_STEPS = 8
"""One step back, half the rate seems to heal an overflow too; only a course shows what the rate does."""
MAX_BACK_STEPS = 32
PAST_STEPS = 2
_LEAST_BACK_STEPS = 3
_RAN_AWAY_LOSSES = 3
_RAN_AWAY_FACTOR = 2.0
_LEAP_FACTOR = 10.0
_TAIL = 3


def limit_of(usual: float) -> float:
    """A loss above this is no longer near ``usual``; the same measure as in the proof of a plan."""
    return max(usual * MAX_RISE, usual + MIN_RISE_NATS)


def calm_level(losses: Sequence[float]) -> float | None:
    """The usual loss before any rise: the median of the lower half. None for no losses."""
    known = sorted(tools.finite(losses))
    return median(known[: (len(known) + 1) // 2]) if known else None


def num_risen(losses: Sequence[float]) -> int:
    """How many of the newest losses, without a gap, stand above the calm level."""
    calm = calm_level(losses)
    count = 0
    for loss in reversed(losses):
        if calm is None or loss <= limit_of(calm):
            break
        count += 1
    return count


def ran_away(case: Case) -> bool:
    """The losses before the failure had been rising, by far more than batches differ."""
    losses = list(case.past.get("recent_losses", ()))
    calm = calm_level(losses)
    if calm is None or num_risen(losses) < _RAN_AWAY_LOSSES:
        return False
    return not losses[-1] < _RAN_AWAY_FACTOR * calm


def jumped(case: Case) -> bool:
    """The rise began with one leap, as after a single huge gradient; a rate that is too high takes several steps."""
    losses = list(case.past.get("recent_losses", ()))
    risen = num_risen(losses)
    calm = calm_level(losses)
    first = losses[-risen] if risen else case.reading.loss
    return calm is not None and not first < _LEAP_FACTOR * calm


def course_wanted(case: Case) -> bool:
    """Whether another course over the last steps can tell something: see ``lower_lr``."""
    if case.trigger is Trigger.RUNAWAY:
        return not case.bad("scan_state")
    if case.trigger is Trigger.UPDATE or not tools.fails_in_step(case) or tools.is_elsewhere(case):
        return False
    if ran_away(case):
        return True
    blamed = case.bad("known_good_batch") and not tools.precision_explains(case)
    return blamed and not case.bad("older_weights") and case.trigger is not Trigger.SCALE


@dataclass(frozen=True, slots=True)
class Course:
    """The last steps before a failure, to be walked again."""

    start: Snapshot
    num_walked: int
    """Steps from ``start`` to the failing one, with it."""
    losses_same: list[float]
    """As the run went: the record of the run, which every redo repeats bit for bit."""
    usual: float
    """The loss of before the rise."""
    committed: bool
    """The failing step was committed: the state of now lies behind it."""

    @classmethod
    def of(cls, lab: Lab, case: Case) -> Course:
        """The course for this failure. Raises NotPossible where it went well, or cannot be walked again."""
        recent = tools.finite(case.past.get("recent_losses", ()))
        committed = case.trigger is Trigger.RUNAWAY
        start, back = _start(lab, recent)
        usual = _usual(case, recent, back)
        same = recent[-back:] + ([] if committed else [case.reading.loss])
        if committed and not median(same[-_TAIL:]) > limit_of(usual):
            raise NotPossible(f"the loss is near that of before ({usual:.4g}), there is nothing to cure")
        return cls(start, back + (0 if committed else 1), same, usual, committed)

    @property
    def cost(self) -> float:
        """Replays of one walk."""
        return float(self.num_walked + PAST_STEPS)

    def walk(self, lab: Lab, conditions: Conditions) -> tuple[list[float], bool]:
        """Losses under other conditions, past the failing step; and whether they end near those of before.

        Raises NotPossible, BudgetSpent.
        """
        steps: list[int | None] = [*[None] * self.num_walked, *_past(lab, committed=self.committed)]
        shots = lab.course(self.start, conditions, steps)
        losses = [s.reading.loss for s in shots]
        whole = len(shots) == len(steps) and not shots[-1].bad
        return losses, whole and median(losses[-_TAIL:]) <= limit_of(self.usual)


def _start(lab: Lab, recent: Sequence[float]) -> tuple[Snapshot, int]:
    """The state to begin from, and how many steps it is back: to where the rise began, at least 8 where there are."""
    now = lab.before.step
    wanted = min(max(MIN_BACK_STEPS, num_risen(recent) + 1), _most_back(lab), now)
    for back in dict.fromkeys((wanted, min(MIN_BACK_STEPS, now))):
        snapshot = lab.state_at(now - back) if back >= _LEAST_BACK_STEPS else None
        if snapshot is not None:
            return snapshot, back
    raise NotPossible(f"no state from {MIN_BACK_STEPS} steps before can be had")


def _most_back(lab: Lab) -> int:
    """Steps back that the budget affords twice: for the experiment, and for the proof of what follows from it."""
    left = lab.budget.max_replays - lab.budget.replays
    afforded = MAX_BACK_STEPS if math.isinf(left) else int(left / 2) - PAST_STEPS - 1
    return min(MAX_BACK_STEPS, max(MIN_BACK_STEPS, afforded))


def _usual(case: Case, recent: Sequence[float], back: int) -> float:
    """The loss of before the rise: as the detector of it says, or the median of before the course, the lower one.

    Where there is no before: the calm level, or the first loss.
    """
    earlier = recent[:-back]
    usual = median(earlier) if len(earlier) >= _TAIL else calm_level(recent)
    usual = case.past.get("first_loss") if usual is None else usual
    known = tools.finite([case.finding.data.get("before"), usual])
    if not known:
        raise NotPossible("no loss of before is known")
    return float(min(known))


def _past(lab: Lab, *, committed: bool) -> list[int | None]:
    """Batches past the failing step: the coming ones; where they are not there yet, the newest that went well."""
    # Where the step was committed, the batch at hand is a coming one already; a loop may not have handed it over yet.
    coming = min(PAST_STEPS, lab.port.ahead() + (1 if committed and is_at_hand(lab.port) else 0))
    known = [s for s in lab.port.clean_steps() if s < lab.step]
    return [*[None] * coming, *known[: PAST_STEPS - coming]]
