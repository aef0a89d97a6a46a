"""Lower rate: the last steps once more over the same batches, with a tenth (half, a hundredth) of the learning rate.

What it changes:
    The learning rate, from a state at least 8 steps back: as far as the losses' rise began.

What each outcome says:
    GOOD: as the run went the loss ran off; with a tenth of the rate (or, where that is better and not yet enough, a
    hundredth) it ends near that of before, past the failing step.
    The rate is too high. (In fp16, where fp32 cures the step, a smaller rate only puts the overflow off.)
    BAD: a smaller rate ends no better. It is not the rate, or the harm was done further back.

What it costs:
    A replay for every step of the course, and two past it; once more for another rate where the budget has room.
    The course as it was is the run's own record: a redo repeats it bit for bit.

Source:
    14 threads in which a changed rate had no effect are why one good step proves nothing, among them
    https://github.com/caduceus-dna/caduceus/issues/32
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from finitune.core.incident import Result, Words
from finitune.engine.case import Case
from finitune.engine.conditions import Conditions
from finitune.engine.experiments._course import Course, course_wanted
from finitune.engine.experiments._tools import Findings, evidence
from finitune.engine.lab import Lab

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
# Half the rate is the proof's to try; here only where the budget has room for as many walks more.
_WALKS_LEFT = 5.0
# Losses at the end of a course that tell how it ended.
_TAIL = 3


def wanted(case: Case) -> bool:
    """The losses ran away, or batches that went well fail too while neither data, state nor precision explains it."""
    return course_wanted(case) and not case.good("tighter_clip")


def run(lab: Lab, case: Case) -> Findings:
    """Walk it with a tenth; then with half where that cures, with a hundredth where it helps, if there is room.

    Raises NotPossible, BudgetSpent.
    """
    course = Course.of(lab, case)
    tenth, good = course.walk(lab, _slower(lab, 0.1))
    half: list[float] = []
    hundredth: list[float] = []
    half_good = None
    if good and lab.budget.left(_WALKS_LEFT * course.cost):
        half, half_good = course.walk(lab, _slower(lab, 0.5))
    if not good and _is_better(tenth, course) and lab.budget.left(_WALKS_LEFT / 2 * course.cost):
        hundredth, good = course.walk(lab, _slower(lab, 0.01))
    found = evidence(
        "lower_lr",
        good,
        start_step=course.start.step,
        losses_same=course.losses_same,
        losses_half=half,
        losses_tenth=tenth,
        losses_hundredth=hundredth,
        factor=0.01 if hundredth else 0.1,
        half_good=half_good,
        median_loss=course.usual,
    )
    return found, ()


def _slower(lab: Lab, factor: float) -> Conditions:
    return replace(lab.now, lr_factor=lab.now.lr_factor * factor)


def _is_better(losses: Sequence[float], course: Course) -> bool:
    """A smaller rate took away at least half of the rise: the direction is right, the step was too short."""
    same = median(course.losses_same[-_TAIL:])
    return len(losses) >= course.num_walked and median(losses[-_TAIL:]) <= (same + course.usual) / 2
