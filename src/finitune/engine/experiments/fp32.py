"""fp32: the failing step with all products and weights in single precision.

What it changes:
    The precision of the computation; the weights keep their values.

What each outcome says:
    GOOD: a half format is too small or too coarse for these values. Data and rate are not to blame.
    BAD: the numbers are bad in any precision.

What it costs:
    One replay (in native half on a CPU much less than the step itself).

Source:
    Micikevicius et al. 2018, "Mixed precision training" (arXiv:1710.03740)
"""

from __future__ import annotations

from finitune.core.incident import Result, Words
from finitune.engine.case import Case
from finitune.engine.experiments._tools import Findings, fails_in_step, flip, is_half, update_unexplained
from finitune.engine.lab import Lab

ORDER = 40
COST = 1.0
SAYS = {
    Result.GOOD: Words(
        "In fp32 the same step is good: loss {loss}, gradient norm {grad_norm}.",
        "在 fp32 下同一步正常：损失 {loss}，梯度范数 {grad_norm}。",
    ),
    Result.BAD: Words(
        "In fp32 the same step fails as well: loss {loss}, gradient norm {grad_norm}.",
        "在 fp32 下同一步同样失败：损失 {loss}，梯度范数 {grad_norm}。",
    ),
}


def wanted(case: Case) -> bool:
    """A step failed in which products or weights are half; an update of half weights, that nothing explains yet."""
    return (fails_in_step(case) or update_unexplained(case)) and is_half(case)


def run(lab: Lab, case: Case) -> Findings:  # noqa: ARG001
    """The step in fp32. Raises NotPossible, BudgetSpent."""
    return flip(lab, "fp32", precision="fp32")
