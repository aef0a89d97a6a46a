"""Adaptive clip: gradients are clipped by their own recent past instead of by a fixed norm.

What it does:
    ZClip first (by z-score of the norm), then AutoClip (by percentile), then AdaGC (tensor by tensor), each after the
    one before relapsed. Where the experiment went back, it goes back as well.

What it costs:
    Steps with an unusual gradient become shorter; those since the start of the experiment are computed anew.

When it is taken back:
    It stays.

Source:
    Kumar et al. 2025, "ZClip"; Seetharaman et al. 2020, "AutoClip"; Wang et al. 2025, "AdaGC"
"""

from __future__ import annotations

from collections.abc import Iterable

from finitune.core import registry
from finitune.core.incident import Cause, Safety, Trigger, Words
from finitune.engine.case import Case
from finitune.engine.conditions import Conditions
from finitune.engine.plan import Plan
from finitune.engine.remedies import _rungs as rungs

SAFETY = Safety.LOSSY
SAYS = Words(
    "Gradients are clipped by their recent past ({clipper}) from step {from_step} on.",
    "从第 {from_step} 步起，按梯度近期的大小裁剪（{clipper}）。",
)
ADVICE = Words(
    "A fixed max_grad_norm near the usual norm ({median_grad_norm}) does the same in a plain script.",
    "在普通脚本中，接近通常范数（{median_grad_norm}）的固定 max_grad_norm 有同样的作用。",
)

_LADDER = ("zclip", "autoclip", "adagc")


def plans(case: Case, cause: Cause, now: Conditions) -> Iterable[Plan]:
    """The next clipper, where clipping cures or a gradient norm is what stands out."""
    stands_out = case.trigger is Trigger.OUTLIER and "grad_norm" in case.finding.data
    if case.bad("tighter_clip") or not (case.good("tighter_clip") or stands_out):
        return
    spent = _LADDER.index(now.clipper) + 1 if now.clipper in _LADDER else rungs.relapses(case, cause, "adaptive_clip")
    known = registry.names("clippers")
    clipper = next((c for c in _LADDER[spent:] if c in known), None)
    if clipper is None or (now.clipper is not None and now.clipper not in _LADDER):
        return
    start = rungs.step(case.number("tighter_clip", "start_step")) if case.good("tighter_clip") else None
    yield rungs.change(
        "adaptive_clip",
        Safety.LOSSY,
        now,
        {"clipper": clipper},
        to_step=start,
        clipper=clipper,
        from_step=case.reading.step if start is None else start + 1,
        median_grad_norm=case.past.get("median_grad_norm") or "-",
    )
