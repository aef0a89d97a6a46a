"""Lower rate: the last steps once more over the same batches, at smaller rates, until the largest is known that holds.

What it changes:
    The learning rate, from the state before the update that the losses' rise began with. The rate of a walk is that
    share of the highest that the schedule is known to reach, and rises over half of the walk.

What each outcome says:
    GOOD: as the run went the loss ran off; at a smaller rate it ends near that of before. The rate is too high. (In
    fp16, where fp32 cures the step, a smaller rate only puts the overflow off.) Half of the largest that holds is
    taken: over a few steps a timid rate looks best, and over many the best one is close to the largest that holds.
    BAD: a smaller rate ends no better. It is not the rate, or the harm was done further back than can be reached.

What it costs:
    A replay for every step of a walk, 8 after a slow rise; a walk that runs away ends at once. Three or four walks: the
    rates, each about a third of the one before, are searched by halving, as far as the budget leaves the proof.
    The course as it was is the run's own record: a redo repeats it bit for bit.

Source:
    Bengio 2012, "Practical recommendations for gradient-based training of deep architectures", section 3.1.1 (the best
    rate is mostly within a factor of 2 of the largest that does not diverge); Smith 2017, "Cyclical Learning Rates for
    Training Neural Networks", section 3.3; 14 threads in which a changed rate had no effect are why one good step
    proves nothing, among them https://github.com/caduceus-dna/caduceus/issues/32
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from finitune.core.incident import Result, Words
from finitune.engine.case import Case
from finitune.engine.conditions import NotPossible
from finitune.engine.experiments._course import Course, Walk, course_wanted
from finitune.engine.experiments._tools import Findings, evidence
from finitune.engine.lab import BudgetSpent, Lab

ORDER = 80
COST = 11.0
SAYS = {
    Result.GOOD: Words(
        "From step {start_step} over the same batches with {holds} of the rate the loss ends near {median_loss} as "
        "before; with the rate as it was it did not.",
        "从第 {start_step} 步起用相同批次、学习率取 {holds} 倍，损失最终回到 {median_loss} 附近；原学习率则没有。",
    ),
    Result.BAD: Words(
        "From step {start_step} over the same batches with {holds} of the rate the loss does not end near "
        "{median_loss} either.",
        "从第 {start_step} 步起用相同批次、学习率取 {holds} 倍，损失也没有回到 {median_loss} 附近。",
    ),
}
_LADDER = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
_SAFE = 0.5
"""Of the largest rate that holds: see the source."""
_AS_GOOD = 1.03
"""Where none holds: a mean loss within this factor of the best one counts as good."""


def wanted(case: Case) -> bool:
    """The losses ran away, or batches that went well fail too while neither data, state nor precision explains it."""
    return course_wanted(case) and not (case.good("tighter_clip") or case.good("borne_rate"))


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

    def halve(self) -> None:
        """Find the largest rate that holds: what is larger than one that does not hold does not either."""
        low, high = 0, len(_LADDER)
        while low < high and (not self.tried or self.affordable()):
            middle = (low + high) // 2
            if self.level(_LADDER[middle]) <= self.course.near:
                high = middle
            else:
                low = middle + 1

    @property
    def holds(self) -> bool:
        """Some rate was found at which the losses are near those of before."""
        return any(w.level <= self.course.near for w in self.tried.values())

    @property
    def chosen(self) -> float:
        """The largest rate that holds; the largest that is about as good as the best where none does."""
        best = min(w.level for w in self.tried.values())
        limit = self.course.near if self.holds else _AS_GOOD * best
        good = [f for f, w in self.tried.items() if math.isfinite(best) and w.level <= limit]
        return max(good) if good else min(self.tried)


def run(lab: Lab, case: Case) -> Findings:
    """Find the largest rate that keeps the loss; go further back where none brings it to that of before.

    Raises NotPossible, BudgetSpent.
    """
    search = _Search(lab, case, Course.of(lab, case))
    try:
        search.halve()
        if not search.holds:
            search = _further(search, search.chosen)
    except (BudgetSpent, NotPossible):
        if not search.tried:
            raise
        # what was walked so far stands
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
    course, holds = search.course, search.chosen
    walk = search.tried[holds]
    found = evidence(
        "lower_lr",
        course.is_near(walk),
        start_step=course.start.step,
        losses_same=course.losses_same,
        losses_tenth=_losses(search, 0.1),
        losses_hundredth=_losses(search, 0.01),
        losses=list(walk.losses),
        levels={f"{f:g}": w.level for f, w in sorted(search.tried.items(), reverse=True)},
        holds=holds,
        factor=_rounded(_SAFE * holds),
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
