"""Courses: how the losses went, where their rise began, and the same batches once more under another condition."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

from finitune.core.incident import Trigger
from finitune.engine.case import Case
from finitune.engine.conditions import Conditions, NotPossible
from finitune.engine.experiments import _tools as tools
from finitune.engine.experiments._rates import raised_in
from finitune.engine.lab import Lab
from finitune.engine.prove import MAX_RISE, MIN_RISE_NATS, ProofSettings, is_at_hand, steps_of
from finitune.engine.snapshot import Snapshot

MIN_BACK_STEPS = 8
"""One step back, half the rate seems to heal an overflow too; only a course of so many steps shows what it does."""
MAX_BACK_STEPS = 32
PAST_STEPS = 2
WALK_STEPS = MIN_BACK_STEPS - PAST_STEPS
"""Of a walk after a slow rise, with two more: what the rate does is seen by then, and the proof goes past the end."""
_LEAST_BATCHES = 6
_LATELY = 16
_RAN_AWAY_LOSSES = 3
_RAN_AWAY_FACTOR = 2.0
_LEAP_FACTOR = 10.0
_TAIL = 3
# A level is that of before within so much, or within the spread of the losses.
_NEAR = 1.15
_NEAR_SIGMAS = 2.0
_SPREAD_OVER = 32
_MAD_TO_SIGMA = 1.4826


def limit_of(usual: float) -> float:
    """A loss above this is no longer near ``usual``; the same measure as in the proof of a plan."""
    return max(usual * MAX_RISE, usual + MIN_RISE_NATS)


def calm_level(losses: Sequence[float]) -> float | None:
    """The usual loss before any rise: the median of the lower half. None for no losses."""
    known = sorted(tools.finite(losses))
    return median(known[: (len(known) + 1) // 2]) if known else None


def near_limit(losses: Sequence[float], usual: float) -> float:
    """A *level* (a median or mean of several losses) above this has not come back to ``usual``."""
    known = tools.finite(losses)[-_SPREAD_OVER:]
    spread = _MAD_TO_SIGMA * median([abs(x - median(known)) for x in known]) if known else 0.0
    return min(limit_of(usual), max(_NEAR * usual, usual + _NEAR_SIGMAS * spread / math.sqrt(_TAIL)))


def num_risen(losses: Sequence[float], limit: float | None = None) -> int:
    """How many of the newest losses, without a gap, stand above the calm level (or above ``limit``)."""
    calm = calm_level(losses)
    limit = limit_of(calm) if limit is None and calm is not None else limit
    count = 0
    for loss in reversed(losses):
        if limit is None or loss <= limit:
            break
        count += 1
    return count


def since_rise(losses: Sequence[float], usual: float) -> int:
    """How many of the newest losses belong to the rise, its slow beginning with it: most of them above ``usual``.

    A rise is seen late: what a single loss does not show, a row of them does. Ends where two of three are not above.
    """
    calm = [x for x in losses if x <= limit_of(usual)]
    least = usual + max(0.05 * usual, near_limit(calm, usual) - usual) / 2
    above = [loss > least for loss in losses]
    count = num_risen(losses, limit_of(usual))
    while count < len(above):
        earlier = above[max(0, len(above) - count - 3) : len(above) - count]
        if not earlier or sum(earlier) * 3 < 2 * len(earlier):
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
    if case.trigger is Trigger.UPDATE or not tools.fails_in_step(case):
        return False
    if case.trigger is Trigger.OUTLIER and (raised_in(case) or ran_away(case)) and not case.bad("scan_state"):
        return True  # whatever the rows seem to show: a rate that has just been raised is under suspicion
    if tools.is_elsewhere(case):
        return False
    if ran_away(case):
        return True
    blamed = case.bad("known_good_batch") and not tools.precision_explains(case)
    return blamed and not case.bad("older_weights") and case.trigger is not Trigger.SCALE


@dataclass(frozen=True, slots=True)
class Walk:
    """One course that was walked."""

    losses: tuple[float, ...]
    whole: bool
    """It came to its end, with finite numbers and no loss beyond all measure."""

    @property
    def level(self) -> float:
        """The mean loss of its second half; inf where it did not come to its end."""
        return fmean(self.losses[len(self.losses) // 2 :]) if self.whole and self.losses else math.inf


@dataclass(frozen=True, slots=True)
class Course:
    """The last steps before a failure, to be walked again."""

    start: Snapshot
    num_back: int
    """Steps used up since ``start``, without the failing one where that was not committed."""
    num_walked: int
    """Batches from ``start`` on that are walked, the two past the failing one not counted."""
    losses_same: list[float]
    """As the run went: the record of the run, which every redo repeats bit for bit."""
    usual: float
    """The loss of before the rise."""
    near: float
    """A level above this has not come back to it."""
    worst: float
    """No healthy step has such a loss: a walk that meets one need not go on."""
    committed: bool
    """The failing step was committed: the state of now lies behind it."""
    boost: float
    """The highest rate that is known to be scheduled over the highest of this course."""

    @classmethod
    def of(cls, lab: Lab, case: Case, *, further: bool = False) -> Course:
        """The course for this failure. ``further``: from twice as far back, or 8 steps further.

        Raises NotPossible where it went well, or cannot be walked again.
        """
        recent = tools.finite(case.past.get("recent_losses", ()))
        committed = case.trigger is Trigger.RUNAWAY
        before = _level_before(case, recent)
        grown = max((r.num_updates for r in raised_in(case)), default=0)
        start, back = _start(lab, case, max(since_rise(recent, before), grown) + 1, further=further)
        usual = _usual(case, recent, back)
        calm = [x for x in recent[: len(recent) - back] if x <= limit_of(usual)]
        near = near_limit(calm, usual)
        same = recent[-back:] + ([] if committed else [case.reading.loss])
        if committed and not median(same[-_TAIL:]) > near:
            raise NotPossible(f"the loss is near that of before ({usual:.4g}), there is nothing to cure")
        # From further back, a walk that ends before the rise would hold at any rate.
        walked = WALK_STEPS if committed and not further else max(WALK_STEPS, back + (not committed))
        worst = max(2.0 * usual, usual + 1.0, 1.5 * max(calm, default=usual))
        return cls(start, back, walked, same, usual, near, worst, committed, _boost(lab, case, back, walked))

    @classmethod
    def since(cls, lab: Lab, case: Case, num_updates: int) -> Course:
        """The course from the state that the oldest of the newest ``num_updates`` updates was made from.

        Raises NotPossible where that cannot be had, or the course went well.
        """
        recent = tools.finite(case.past.get("recent_losses", ()))
        committed = case.trigger is Trigger.RUNAWAY
        made = num_updates - (case.trigger is Trigger.UPDATE)
        start = _updates_back(lab, made)
        calm = recent[: max(0, len(recent) - made)]
        usual = _usual(case, recent, made) if made else _level_before(case, recent)
        near = near_limit([x for x in calm if x <= limit_of(usual)], usual)
        same = recent[len(calm) :] + ([] if committed else [case.reading.loss])
        if committed and not median(same[-_TAIL:]) > near:
            raise NotPossible(f"the loss is near that of before ({usual:.4g}), there is nothing to cure")
        back = lab.before.step - start.step
        worst = max(2.0 * usual, usual + 1.0, 1.5 * max(calm, default=usual))
        return cls(start, back, back, same, usual, near, worst, committed, 1.0)

    @property
    def cost(self) -> float:
        """Replays of one walk."""
        return float(self.num_walked + PAST_STEPS)

    @property
    def proof(self) -> float:
        """Replays of the proof of what follows."""
        return float(self.num_back + 1 + PAST_STEPS)

    def walk(self, lab: Lab, conditions: Conditions) -> tuple[list[float], bool]:
        """Losses under other conditions, past the failing step; and whether they end near those of before.

        Raises NotPossible, BudgetSpent.
        """
        found = self._walked(lab, conditions)
        return list(found.losses), found.whole and median(found.losses[-_TAIL:]) <= limit_of(self.usual)

    def at_rate(self, lab: Lab, case: Case, factor: float) -> Walk:
        """The walk with ``factor`` of the rate, as high as the schedule is known to lead; ends early at a blow-up.

        Raises NotPossible, BudgetSpent.
        """
        changes: dict[str, Any] = {"lr_factor": lab.now.lr_factor * factor * self.boost, **self.warmup(case)}
        with _stopping_beyond(lab, self.worst):
            return self._walked(lab, replace(lab.now, **changes))

    def as_proved(self, lab: Lab, conditions: Conditions) -> Walk:
        """A walk over the very steps of a plan's proof, which it then is; ends early at a blow-up.

        Raises NotPossible, BudgetSpent.
        """
        steps = steps_of(lab, self.start, ProofSettings().past_steps)
        with _stopping_beyond(lab, self.worst):
            shots = lab.course(self.start, conditions, steps)
        return Walk(tuple(s.reading.loss for s in shots), len(shots) == len(steps) and not shots[-1].bad)

    def is_near(self, walk: Walk) -> bool:
        """Its level is that of before; halfway to that of the run's own course is no cure."""
        same = tools.finite(self.losses_same[-_TAIL:])
        halfway = (median(same) + self.usual) / 2 if len(same) == len(self.losses_same[-_TAIL:]) else math.inf
        return walk.level <= min(limit_of(self.usual), max(self.near, halfway))

    def warmup(self, case: Case) -> dict[str, int]:
        """Conditions of a re-warm-up over half of the walk; none where the schedule itself is still rising."""
        updates = case.past.get("updates")
        if not isinstance(updates, int) or self.boost > 1.0 or self.num_walked < 2:
            return {}
        return {"warmup_from_update": max(0, updates - self.num_back), "warmup_steps": self.num_walked // 2}

    def _walked(self, lab: Lab, conditions: Conditions) -> Walk:
        steps = self._steps(lab)
        shots = lab.course(self.start, conditions, steps)
        return Walk(tuple(s.reading.loss for s in shots), len(shots) == len(steps) and not shots[-1].bad)

    def _steps(self, lab: Lab) -> list[int | None]:
        """The batches since ``start``, then coming ones; where they are not there yet, the newest that went well."""
        total = self.num_walked + PAST_STEPS
        # Where the step was committed, the batch at hand is a coming one; a loop may not have handed it over yet.
        at_hand = 1 if not self.committed or is_at_hand(lab.port) else 0
        there = min(total, self.num_back + at_hand + lab.port.ahead())
        # Not those of the course: what is trained on twice in a row is learnt by heart, the sooner the higher the rate.
        known = [s for s in lab.port.clean_steps() if s <= self.start.step][: total - there]
        if there + len(known) < _LEAST_BATCHES:
            raise NotPossible(f"only {there + len(known)} batches are at hand, {_LEAST_BATCHES} are needed")
        return [*[None] * there, *known]


@contextmanager
def _stopping_beyond(lab: Lab, worst: float) -> Iterator[None]:
    """Inside, a step of a course whose loss is beyond ``worst`` counts as bad: the course ends there."""
    was = lab.case
    lab.case = replace(was, trigger=Trigger.OUTLIER, finding=replace(was.finding, data={"limit": worst}))
    try:
        yield
    finally:
        lab.case = was


def _start(lab: Lab, case: Case, risen: int, *, further: bool) -> tuple[Snapshot, int]:
    """The state to begin from, and how many steps it is back: before the update that the rise began with."""
    now = lab.before.step
    least = 2 if case.trigger in (Trigger.RUNAWAY, Trigger.OUTLIER) else MIN_BACK_STEPS
    wanted = max(least, risen)
    if further:
        wanted = wanted + max(MIN_BACK_STEPS, wanted)
    wanted = min(wanted, _most_back(lab), now)
    for back in dict.fromkeys((wanted, min(MIN_BACK_STEPS, now), min(least, now))):
        snapshot = lab.state_at(now - back) if back > 0 else None
        if snapshot is not None:
            return snapshot, back
    raise NotPossible(f"no state from {wanted} steps before can be had")


def _updates_back(lab: Lab, made: int) -> Snapshot:
    """The state before the newest ``made`` updates. Raises NotPossible where it cannot be had.

    A batch that was given up is a step without an update.
    """
    now, back = int(lab.before.record["updates"]), made
    while back <= min(lab.before.step, 2 * MAX_BACK_STEPS):
        snapshot = lab.state_at(lab.before.step - back)
        if snapshot is None:
            break
        lacking = made - (now - int(snapshot.record["updates"]))
        if lacking <= 0:
            return snapshot
        back += lacking
    raise NotPossible(f"no state from {made} updates before can be had")


def _most_back(lab: Lab) -> int:
    """Steps back that the budget affords: a walk is short, the proof walks all of them."""
    left = lab.budget.max_replays - lab.budget.replays
    afforded = MAX_BACK_STEPS if math.isinf(left) else int(left / 2) - PAST_STEPS - 1
    return min(MAX_BACK_STEPS, max(MIN_BACK_STEPS, afforded))


def _level_before(case: Case, recent: Sequence[float]) -> float:
    """The loss that was usual before the rise, as far as it can be told without knowing where that began."""
    known = tools.finite([case.finding.data.get("before"), calm_level(recent), case.past.get("first_loss")][:2])
    first = tools.finite([case.past.get("first_loss")])
    if not known and not first:
        raise NotPossible("no loss of before is known")
    return float(min(known or first))


def _usual(case: Case, recent: Sequence[float], back: int) -> float:
    """The loss of before the rise: as the detector of it says, or the median of before the course, the lower one.

    Where there is no before: the calm level, or the first loss.
    """
    earlier = recent[:-back][-_LATELY:]
    usual = median(earlier) if len(earlier) >= _TAIL else calm_level(recent)
    usual = case.past.get("first_loss") if usual is None else usual
    known = tools.finite([case.finding.data.get("before"), usual])
    if not known:
        raise NotPossible("no loss of before is known")
    return float(min(known))


def _boost(lab: Lab, case: Case, back: int, num_walked: int) -> float:
    """How far the schedule is known to rise above the rates of the course: these alone would prove too little.

    Measured at the middle of the walk: a rate that is reached at its end has not done its harm yet.
    """
    rates = tools.finite(case.past.get("recent_rates", ()))
    if len(rates) < back or not rates[-1] > 0:
        return 1.0
    walked = rates[-back:][:num_walked]
    highest = max(rates)
    if len(walked) < 2 or walked[-1] > walked[0]:  # a warm-up goes on to the rate that the optimizer was made with
        group = lab.port.optimizer.param_groups[0]
        base = tools.finite([group.get("initial_lr", lab.port.optimizer.defaults.get("lr"))])
        highest = max([highest, *(b * lab.now.lr_factor for b in base)])
    return max(1.0, highest / max(walked[: len(walked) // 2 + 1]))
