"""Borne rate: from where the schedule raised the rate, the same batches at the rate that the run had borne until then.

What it changes:
    The learning rate is at most the highest of before, from the state that the first update at a higher one was made
    from. A schedule that comes down below that is followed again. No warm-up: moments and weights are those of then.

What each outcome says:
    GOOD: at the rate of before the failure is gone and the losses stay; as the run went they did not. Nothing but the
    rate was different, so the rise of the rate is the reason, and the rate of before is the cure.
    BAD: at the rate of before it fails as well. What came with the rise (other data, a restart) is to be looked at.

What it costs:
    A replay for each step since the rise, the failing one, and two past it; ends at the first that is beyond all
    measure. That is the proof of the cure, too. The course as it was is the run's own record.

Source:
    Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 2.2: what a run bears depends on where it has come to;
    https://github.com/haotian-liu/LLaVA/issues/1375, https://github.com/paiml/aprender/pull/2258 (rates that rose)
"""

from __future__ import annotations

from dataclasses import replace

from finitune.core.incident import Result, Trigger, Words
from finitune.engine.case import Case
from finitune.engine.conditions import NotPossible
from finitune.engine.experiments._course import Course
from finitune.engine.experiments._rates import Raised, exact, raised_in
from finitune.engine.experiments._tools import (
    Findings,
    evidence,
    fails_in_step,
    precision_explains,
    update_unexplained,
)
from finitune.engine.lab import Lab

ORDER = 43
COST = 6.0
SAYS = {
    Result.GOOD: Words(
        "From step {start_step}, where the rate rose to {was}, the same batches at {max_lr} as before: the loss ends "
        "near {median_loss}; as the run went it did not.",
        "从第 {start_step} 步起学习率升到 {was}；用相同批次、保持此前的 {max_lr}，损失最终在 {median_loss} 附近；"
        "按原样运行则没有。",
    ),
    Result.BAD: Words(
        "From step {start_step}, where the rate rose to {was}, the same batches at {max_lr} as before: it fails too.",
        "从第 {start_step} 步起学习率升到 {was}；用相同批次、保持此前的 {max_lr}，同样失败。",
    ),
}
_MOST_TRIED = 2


def wanted(case: Case) -> bool:
    """The rate was raised not long ago, and neither precision nor a spoilt state explains the failure."""
    if case.bad("scan_state") or precision_explains(case) or not raised_in(case):
        return False
    if case.trigger is Trigger.UPDATE:
        return update_unexplained(case)
    if case.trigger is Trigger.RUNAWAY:
        return True
    # Whatever the batch seems to show: a hard one stands out at the rate of before as well.
    alone = case.good("known_good_batch") and case.trigger is not Trigger.OUTLIER
    return fails_in_step(case) and not alone


def run(lab: Lab, case: Case) -> Findings:
    """The newest rise first, then the one before it. Raises NotPossible, BudgetSpent."""
    found: Findings | None = None
    refused: NotPossible | None = None
    for rise in raised_in(case)[:_MOST_TRIED]:
        try:
            found = _walked(lab, case, rise)
        except NotPossible as reason:
            refused = refused or reason
            continue
        if found[0].result is Result.GOOD:
            break
    if found is None:
        raise refused or NotPossible("the rate was not raised")
    return found


def _walked(lab: Lab, case: Case, rise: Raised) -> Findings:
    course = Course.since(lab, case, rise.num_updates)
    limit = exact(rise.borne / lab.now.lr_factor)
    walk = course.as_proved(lab, replace(lab.now, max_lr=limit))
    good = walk.whole and course.is_near(walk)
    found = evidence(
        "borne_rate",
        good,
        start_step=course.start.step,
        max_lr=rise.borne,
        limit=limit,
        was=rise.highest,
        num_updates=rise.num_updates,
        losses=list(walk.losses),
        losses_same=course.losses_same,
        median_loss=course.usual,
        near=course.near,
    )
    return found, ()
