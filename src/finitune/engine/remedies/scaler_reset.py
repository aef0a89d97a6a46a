"""Scaler reset: the loss scale gets a floor that is low enough, and never falls through it.

What it does:
    Sets the floor of the dynamic loss scale, so that the scale can reach one at which the gradients are finite, and
    cannot fall towards 0 as that of a common scaler does.

What it costs:
    Some small gradients round to 0 at a small scale; no data, no progress.

When it is taken back:
    The scale grows by itself again; the floor stays.

Source:
    https://github.com/deepspeedai/DeepSpeed/issues/931 ; Micikevicius et al. 2018, "Mixed Precision Training",
    section 3.2
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
    "The loss scale may fall to {min_scale} and no further (it was {loss_scale}; good at {good_at}).",
    "损失缩放可降至 {min_scale}，不再更低（此前为 {loss_scale}；在 {good_at} 时正常）。",
)
ADVICE = Words(
    "scaler.min_scale: {min_scale}; better, precision: bf16, which needs no loss scale",
    "scaler.min_scale: {min_scale}；更好的是 precision: bf16，它不需要损失缩放",
)

_USUAL_FLOOR = 2.0**-4


def plans(case: Case, cause: Cause, now: Conditions) -> Iterable[Plan]:  # noqa: ARG001
    """Where the gradients are finite at a smaller scale than the run's."""
    scale = case.reading.loss_scale
    if not case.good("loss_scales") or scale is None or now.precision is not None:
        return
    values = case.number("loss_scales", "good_at", ())
    listed = values if isinstance(values, list | tuple) else ()
    good = [n for v in listed if (n := rungs.number(v)) is not None and n > 0]
    floor = min(_USUAL_FLOOR, max(good, default=_USUAL_FLOOR))
    if good and (now.min_scale is None or now.min_scale > floor):
        shown = ", ".join(f"{g:g}" for g in good)
        yield rungs.change(
            "scaler_reset", Safety.SAFE, now, {"min_scale": floor}, min_scale=floor, loss_scale=scale, good_at=shown
        )
