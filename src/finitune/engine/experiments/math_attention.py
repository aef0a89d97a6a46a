"""Plain attention: the failing step with attention as a product, a softmax and a product.

What it changes:
    The kernel of attention ("eager" in transformers' models, the math kernel of torch's); the formula is the same.

What each outcome says:
    GOOD: the fused kernel makes the bad numbers (a bug for this length, head size or mask).
    BAD: attention as such, or something else, does.

What it costs:
    One replay, and memory for the scores.

Source:
    https://github.com/pytorch/pytorch/issues/103749 , https://github.com/pytorch/pytorch/issues/196678
"""

from __future__ import annotations

from finitune.core.incident import Result, Words
from finitune.engine.case import Case
from finitune.engine.experiments._course import ran_away
from finitune.engine.experiments._tools import Findings, fails_in_step, flip, may_be_attention
from finitune.engine.lab import Lab

ORDER = 60
COST = 1.0
SAYS = {
    Result.GOOD: Words(
        "With plain attention the same step is good: loss {loss}, gradient norm {grad_norm}.",
        "使用普通注意力时同一步正常：损失 {loss}，梯度范数 {grad_norm}。",
    ),
    Result.BAD: Words(
        "With plain attention the same step fails as well: loss {loss}, gradient norm {grad_norm}.",
        "使用普通注意力时同一步同样失败：损失 {loss}，梯度范数 {grad_norm}。",
    ),
}
_PLAIN = ("math", "eager")


def wanted(case: Case) -> bool:
    """A fused kernel may be at fault: in attention, or in a backward pass where nothing was localised.

    A bug of a half kernel goes away in fp32, as another kernel is taken there; in bf16 it stays. Where both formats
    cure, it is the range.
    """
    if not fails_in_step(case) or not may_be_attention(case) or case.facts.get("attention") in _PLAIN:
        return False
    if ran_away(case):  # numbers near the end of fp32's range: which kernel passes it first says nothing
        return False
    return not (case.bad("scan_state") or case.good("loss_scales") or case.good("fp32", "bf16"))


def run(lab: Lab, case: Case) -> Findings:  # noqa: ARG001
    """The step with plain attention. Raises NotPossible, BudgetSpent."""
    return flip(lab, "math_attention", attention="math")
