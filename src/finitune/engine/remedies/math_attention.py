"""Math attention: the plain attention instead of a fused kernel.

What it does:
    Computes attention step by step (eager, or torch's math kernel).

What it costs:
    Speed, and memory that grows with the square of the length; no data, no progress.

When it is taken back:
    It stays: the fault hangs on shapes, and the next batch may have that shape again.

Source:
    https://github.com/pytorch/pytorch/issues/196678 , https://github.com/NVIDIA-NeMo/Automodel/pull/2687
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
    "Attention is computed by the plain kernel from now on (before: {was}).",
    "从现在起用普通算子计算注意力（此前：{was}）。",
)
ADVICE = Words("model.attn_implementation: eager", "model.attn_implementation: eager")

_PLAIN = ("math", "eager")


def plans(case: Case, cause: Cause, now: Conditions) -> Iterable[Plan]:  # noqa: ARG001
    """Unless it is in use, or was tried and is no cure."""
    was = str(case.facts.get("attention", "-"))
    if now.attention in _PLAIN or was in _PLAIN or rungs.is_impossible(case, "math_attention"):
        return
    yield rungs.change("math_attention", Safety.SAFE, now, {"attention": "math"}, was=was)
