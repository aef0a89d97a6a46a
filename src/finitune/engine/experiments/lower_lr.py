"""Lower rate: the last steps once more over the same batches, with a tenth (and half) of the learning rate.

What it changes:
    The learning rate, from a state at least 8 steps back: as far as the losses' rise began.

What each outcome says:
    GOOD: as the run went the loss ran off; with a tenth of the rate it ends near that of before, past the failing step.
    The rate is too high. (In fp16, where fp32 cures the step, a smaller rate only puts the overflow off.)
    BAD: a smaller rate ends no better. It is not the rate, or the harm was done further back.

What it costs:
    A replay for every step of the course, and two past it; once more for half the rate where the budget has room.
    The course as it was is the run's own record: a redo repeats it bit for bit.

Source:
    14 threads in which a changed rate had no effect are why one good step proves nothing, among them
    https://github.com/caduceus-dna/caduceus/issues/32
"""

from __future__ import annotations

from dataclasses import replace

from finitune.core.incident import Result, Words
from finitune.engine.case import Case
from finitune.engine.experiments._course import Course, course_wanted
from finitune.engine.experiments._tools import Findings, evidence
from finitune.engine.lab import Lab

ORDER = 80
COST = 11.0
SAYS = {
    Result.GOOD: Words(
        "From step {start_step} over the same batches with a tenth of the rate the loss ends near {median_loss} as "
        "before; with the rate as it was it did not.",
        "从第 {start_step} 步起用相同批次、学习率取十分之一，损失最终回到此前的 {median_loss} 附近；按原学习率则没有。",
    ),
    Result.BAD: Words(
        "From step {start_step} over the same batches with a tenth of the rate the loss does not end near "
        "{median_loss} either.",
        "从第 {start_step} 步起用相同批次、学习率取十分之一，损失也没有回到 {median_loss} 附近。",
    ),
}
# Half the rate is the proof's to try; here only where the budget has room for as many walks more.
_WALKS_LEFT = 5.0


def wanted(case: Case) -> bool:
    """The losses ran away, or batches that went well fail too while neither data, state nor precision explains it."""
    return course_wanted(case) and not case.good("tighter_clip")


def run(lab: Lab, case: Case) -> Findings:
    """Walk it with a tenth; where that cures and there is room, with half. Raises NotPossible, BudgetSpent."""
    course = Course.of(lab, case)
    tenth, good = course.walk(lab, replace(lab.now, lr_factor=lab.now.lr_factor * 0.1))
    half: list[float] = []
    half_good = None
    if good and lab.budget.left(_WALKS_LEFT * course.cost):
        half, half_good = course.walk(lab, replace(lab.now, lr_factor=lab.now.lr_factor * 0.5))
    found = evidence(
        "lower_lr",
        good,
        start_step=course.start.step,
        losses_same=course.losses_same,
        losses_half=half,
        losses_tenth=tenth,
        half_good=half_good,
        median_loss=course.usual,
    )
    return found, ()
