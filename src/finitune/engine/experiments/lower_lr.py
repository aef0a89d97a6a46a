"""Lower rate: the last steps once more over the same batches, with a tenth of the learning rate, a hundredth, ...

What it changes:
    The learning rate, from the state before the update that the losses' rise began with. The rate of a walk is that
    share of the highest that the schedule is known to reach, and rises over half of the walk.

What each outcome says:
    GOOD: as the run went the loss ran off; at a smaller rate it ends near that of before. The rate is too high. (In
    fp16, where fp32 cures the step, a smaller rate only puts the overflow off.) Of the rates that were tried the
    largest is taken whose losses are within 3 % of the best: what is too small cures as well, and learns nothing.
    BAD: a smaller rate ends no better. It is not the rate, or the harm was done further back than can be reached.

What it costs:
    A replay for every step of a walk, 8 after a slow rise; a walk that runs away ends at once. A tenth, a thirtieth, a
    hundredth, ... until a smaller one gains nothing; then a little more than what was good (0.3 and 0.5 above a tenth),
    as far as the budget leaves the proof.
    The course as it was is the run's own record: a redo repeats it bit for bit.

Source:
    Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3 (the range of rates that train);
    14 threads in which a changed rate had no effect are why one good step proves nothing, among them
    https://github.com/caduceus-dna/caduceus/issues/32
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median

from finitune.core.incident import Result, Words
from finitune.engine.case import Case
from finitune.engine.conditions import NotPossible
from finitune.engine.experiments._course import Course, Walk, course_wanted, limit_of
from finitune.engine.experiments._tools import Findings, evidence
from finitune.engine.lab import BudgetSpent, Lab

ORDER = 80
COST = 11.0
SAYS = {
    Result.GOOD: Words(
        "From step {start_step} over the same batches with {factor} of the rate the loss ends near {median_loss} as "
        "before; with the rate as it was it did not.",
        "从第 {start_step} 步起用相同批次、学习率取 {factor} 倍，损失最终回到 {median_loss} 附近；原学习率则没有。",
    ),
    Result.BAD: Words(
        "From step {start_step} over the same batches with {factor} of the rate the loss does not end near "
        "{median_loss} either.",
        "从第 {start_step} 步起用相同批次、学习率取 {factor} 倍，损失也没有回到 {median_loss} 附近。",
    ),
}
_LADDER = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
_HALF = 0.5
# Tried at last: above a rung that is good, and, above the highest, these.
_ABOVE, _MILD = 1.8, (0.3, _HALF)
_AS_GOOD = 1.03
"""A mean loss within this factor of the best one counts as good: over a few steps the best rate is a timid one."""
_GAIN = 0.99
"""A smaller rate that does not come below this factor of the one before gains nothing."""
_TAIL = 3


def wanted(case: Case) -> bool:
    """The losses ran away, or batches that went well fail too while neither data, state nor precision explains it."""
    return course_wanted(case) and not case.good("tighter_clip")


@dataclass(slots=True)
class _Search:
    """Walks at several rates from one state."""

    lab: Lab
    case: Case
    course: Course
    tried: dict[float, Walk] = field(default_factory=dict)
    """By the share of the rate."""

    def affordable(self) -> bool:
        """Whether a walk leaves enough for the proof."""
        return self.lab.budget.left(self.course.cost + self.course.proof)

    def level(self, factor: float) -> float:
        """The mean loss at the end of the walk at this rate. Raises NotPossible, BudgetSpent."""
        self.tried[factor] = self.course.at_rate(self.lab, self.case, factor)
        return self.tried[factor].level

    def downwards(self) -> None:
        """Smaller and smaller, until that gains nothing."""
        before = math.inf
        for factor in _LADDER:
            if self.tried and not self.affordable():
                return
            level = self.level(factor)
            if math.isfinite(before) and level >= _GAIN * before:
                return
            before = level

    def upwards(self) -> None:
        """Larger than the largest good one, as long as that is good."""
        good = self.chosen
        if not math.isfinite(self.tried[good].level):
            return
        for factor in _MILD if good == _LADDER[0] else (_rounded(good * _ABOVE),):
            if not self.affordable() or (self.level(factor) > 0 and self.chosen != factor):
                return

    @property
    def best(self) -> float:
        """The smallest mean loss."""
        return min(w.level for w in self.tried.values())

    @property
    def chosen(self) -> float:
        """The largest rate that is about as good as the best, or the smallest of all where none came to its end."""
        best = self.best
        good = [f for f, w in self.tried.items() if math.isfinite(best) and w.level <= _AS_GOOD * best]
        return max(good) if good else min(self.tried)


def run(lab: Lab, case: Case) -> Findings:
    """Find the largest rate that keeps the loss; go further back where none brings it to that of before.

    Raises NotPossible, BudgetSpent.
    """
    search = _Search(lab, case, Course.of(lab, case))
    search.downwards()
    chosen = search.chosen
    try:
        if search.tried[chosen].level > search.course.near:
            search = _further(search, chosen)
        search.upwards()
    except (BudgetSpent, NotPossible):
        pass  # what was walked so far stands
    return _told(search)


def _further(search: _Search, factor: float) -> _Search:
    """The same from a state further back, where the loss comes nearer to that of before from there."""
    if not search.affordable():
        return search
    course = Course.of(search.lab, search.case, further=True)
    if course.num_back <= search.course.num_back or not search.lab.budget.left(course.cost + course.proof):
        return search
    other = _Search(search.lab, search.case, course)
    was = search.tried[factor].level
    return other if other.level(factor) < _AS_GOOD**-1 * was else search


def _told(search: _Search) -> Findings:
    course, factor = search.course, search.chosen
    walk = search.tried[factor]
    same = median(course.losses_same[-_TAIL:])
    # Where nothing better than halfway is reached, the rate explains no more than a part of it.
    good = walk.level <= min(limit_of(course.usual), max(course.near, (same + course.usual) / 2))
    half = search.tried.get(_HALF)
    found = evidence(
        "lower_lr",
        good,
        start_step=course.start.step,
        losses_same=course.losses_same,
        losses_half=_losses(search, _HALF),
        losses_tenth=_losses(search, 0.1),
        losses_hundredth=_losses(search, 0.01),
        losses=list(walk.losses),
        levels={f"{f:g}": w.level for f, w in sorted(search.tried.items(), reverse=True)},
        factor=factor,
        half_good=None if half is None else factor == _HALF,
        median_loss=course.usual,
        near=course.near,
        came_back=walk.level <= course.near,
        **course.warmup(search.case),
    )
    return found, ()


def _losses(search: _Search, factor: float) -> list[float]:
    return list(search.tried[factor].losses) if factor in search.tried else []


def _rounded(factor: float) -> float:
    """0.3, not 0.30000000000000004: it is shown."""
    return float(f"{factor:.3g}")
