"""Safe softmax: the failing step with torch's own attention, whose softmax over nothing is 0 and not NaN.

What it changes:
    The attention of transformers' models, from "eager" to "sdpa"; formula and mask are the same.

What each outcome says:
    GOOD: some token has nothing to look at (the mask forbids all). Computed step by step its softmax is 0 / 0.
    BAD: attention as such, or something else, makes the bad numbers.

What it costs:
    One replay.

Source:
    https://github.com/pytorch/pytorch/issues/103749 ; torch 2.5 and later give 0 for a row that is masked throughout
"""

from __future__ import annotations

from finitune.core.incident import Result, Words
from finitune.engine.case import Case
from finitune.engine.causes import _signs as signs
from finitune.engine.experiments._course import ran_away
from finitune.engine.experiments._tools import Findings, fails_in_step, flip
from finitune.engine.lab import Lab

ORDER = 47
COST = 1.0
SAYS = {
    Result.GOOD: Words(
        "With an attention whose softmax over nothing is 0 the same step is good: loss {loss}, gradient norm "
        "{grad_norm}.",
        "改用对空集 softmax 取 0 的注意力时同一步正常：损失 {loss}，梯度范数 {grad_norm}。",
    ),
    Result.BAD: Words(
        "With an attention whose softmax over nothing is 0 the same step fails as well: loss {loss}, gradient norm "
        "{grad_norm}.",
        "改用对空集 softmax 取 0 的注意力时同一步同样失败：损失 {loss}，梯度范数 {grad_norm}。",
    ),
}


def wanted(case: Case) -> bool:
    """A softmax makes the first bad number in a forward pass, it is computed step by step, and it is not the range."""
    if not fails_in_step(case) or case.facts.get("attention") != "eager" or not signs.is_softmax(case):
        return False
    forward = signs.phase(case) == "forward" and not ran_away(case)
    return forward and not (case.bad("scan_state") or signs.precision_cures(case) or case.good("loss_scales"))


def run(lab: Lab, case: Case) -> Findings:  # noqa: ARG001
    """The step with torch's attention. Raises NotPossible where the model cannot change it, BudgetSpent."""
    return flip(lab, "safe_softmax", attention="sdpa")
