"""Tighter clip: the last steps once more over the same batches, with the gradient clipped to half its usual norm.

What it changes:
    max_grad_norm, from the state that ``lower_lr`` begins at; the rate stays.

What each outcome says:
    GOOD: as the run went the loss ran off; clipped it ends near that of before, past the failing step. Single huge
    gradients carry the run away.
    BAD: clipping does not hold it.

What it costs:
    A replay for every step of the course, and two past it.

Source:
    Pascanu et al. 2013, "On the difficulty of training recurrent neural networks" (arXiv:1211.5063). Adam divides a
    gradient by its own size: measured, clipping does not heal what overflows under AdamW.
"""

from __future__ import annotations

import math
from dataclasses import replace

from finitune.core.incident import Result, Trigger, Words
from finitune.engine.case import Case
from finitune.engine.conditions import NotPossible
from finitune.engine.experiments._course import Course, course_wanted, jumped
from finitune.engine.experiments._tools import Findings, evidence, is_adam
from finitune.engine.lab import Lab

ORDER = 78
COST = 11.0
SAYS = {
    Result.GOOD: Words(
        "From step {start_step} over the same batches, clipped to a gradient norm of {max_grad_norm}, the loss ends "
        "near that of before.",
        "从第 {start_step} 步起用相同批次、把梯度范数裁剪到 {max_grad_norm}，损失最终回到此前的水平。",
    ),
    Result.BAD: Words(
        "Clipping to a gradient norm of {max_grad_norm} from step {start_step} on does not hold the loss.",
        "从第 {start_step} 步起把梯度范数裁剪到 {max_grad_norm} 也不能稳住损失。",
    ),
}


def wanted(case: Case) -> bool:
    """As for the rate, and after it where it did not cure. Before it where the rise began with a leap under SGD."""
    if not course_wanted(case) or case.good("lower_lr") or case.good("borne_rate"):
        return False
    stands_out = case.trigger is Trigger.OUTLIER and "grad_norm" in case.finding.data
    return case.bad("lower_lr") or (not is_adam(case) and (stands_out or jumped(case)))


def run(lab: Lab, case: Case) -> Findings:
    """Walk it, clipped. Raises NotPossible where no usual norm is known or the clip is as tight, BudgetSpent."""
    usual = case.past.get("median_grad_norm")
    if usual is None or not (math.isfinite(usual) and usual > 0):
        raise NotPossible("the usual gradient norm is not known")
    limit = float(usual) / 2
    present = [n for n in (case.facts.get("max_grad_norm"), lab.now.max_grad_norm) if n]
    if any(n <= limit for n in present):
        raise NotPossible(f"gradients are clipped to {min(present):g} already")
    course = Course.of(lab, case)
    losses, good = course.walk(lab, replace(lab.now, max_grad_norm=limit))
    start = course.start.step
    return evidence("tighter_clip", good, start_step=start, max_grad_norm=limit, losses=losses), ()
