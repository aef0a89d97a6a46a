"""Safe softmax: torch's own attention, whose softmax over nothing is 0 and not NaN.

What it does:
    Models of transformers compute attention by "sdpa" instead of "eager". What sees no token gets 0; everything else
    is as before, but for rounding. No row is lost.

What it costs:
    Nothing; it is faster. Attention probabilities cannot be read from it.

When it is taken back:
    It stays: the next row whose mask forbids everything would fail again.

Source:
    https://github.com/pytorch/pytorch/issues/103749 , https://github.com/huggingface/trl/issues/1842
"""

from __future__ import annotations

from collections.abc import Iterable

from finitune.core.incident import Cause, Safety, Words
from finitune.engine.case import Case
from finitune.engine.conditions import Conditions
from finitune.engine.plan import Plan
from finitune.engine.remedies import _rungs as rungs

SAFETY = Safety.SAFE
SAYS = Words(
    "Attention is computed by torch's kernel from now on (before: {was}); what sees no token gets 0.",
    "从现在起用 torch 的算子计算注意力（此前：{was}）；没有可关注位置的 token 得到 0。",
)
ADVICE = Words("model.attn_implementation: sdpa", "model.attn_implementation: sdpa")


def plans(case: Case, cause: Cause, now: Conditions) -> Iterable[Plan]:  # noqa: ARG001
    """Only where the experiment cured with it, and no other attention is in force."""
    if now.attention is None and case.good("safe_softmax"):
        was = str(case.facts.get("attention", "-"))
        yield rungs.change("safe_softmax", Safety.SAFE, now, {"attention": "sdpa"}, was=was)
