"""bf16: the failing step in the half format that has the range of fp32 and 8 bits of mantissa.

What it changes:
    The precision of the computation, from fp16; the weights keep their values, rounded.

What each outcome says:
    GOOD: the range of fp16 (65504) is what is missing.
    BAD: with fp32 good, it is the mantissa; with fp32 bad, it is no matter of precision.

What it costs:
    One replay.

Source:
    Kalamkar et al. 2019, "A study of BFLOAT16 for deep learning training" (arXiv:1905.12322)
"""

from __future__ import annotations

from finitune.core.incident import Result, Words
from finitune.engine.case import Case
from finitune.engine.experiments._tools import Findings, fails_in_step, flip, is_fp16, update_unexplained
from finitune.engine.lab import Lab

ORDER = 42
COST = 1.0
SAYS = {
    Result.GOOD: Words(
        "In bf16 the same step is good: loss {loss}, gradient norm {grad_norm}.",
        "在 bf16 下同一步正常：损失 {loss}，梯度范数 {grad_norm}。",
    ),
    Result.BAD: Words(
        "In bf16 the same step fails as well: loss {loss}, gradient norm {grad_norm}.",
        "在 bf16 下同一步同样失败：损失 {loss}，梯度范数 {grad_norm}。",
    ),
}


def wanted(case: Case) -> bool:
    """A step failed in fp16, and fp32 has not shown that precision has no part in it."""
    return (fails_in_step(case) or update_unexplained(case)) and is_fp16(case) and not case.bad("fp32")


def run(lab: Lab, case: Case) -> Findings:  # noqa: ARG001
    """The step in bf16. Raises NotPossible, BudgetSpent."""
    return flip(lab, "bf16", precision="bf16")
