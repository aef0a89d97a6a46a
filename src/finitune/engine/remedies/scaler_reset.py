"""Scaler reset: the loss scale is set at once to one that fits, and never falls through its floor.

What it does:
    Sets the dynamic loss scale to what the experiment found, with room for larger gradients, instead of halving it once
    a batch; the floor goes down with it where the usual one is too high. Batches that were given up while the scaler
    searched are trained on: the run goes back to the first of them. Only where at that scale the gradients are still
    those of fp32: a scale that makes one loud part fit and the rest round to 0 cures nothing.

What it costs:
    Some small gradients round to 0 at a small scale; no data, no progress.

When it is taken back:
    After the probation, the first time: the scale grows by itself again.

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
    "The loss scale is {scale} from step {from_step} on, and may fall to {min_scale} (it was {loss_scale}; good at "
    "{good_at}).",
    "从第 {from_step} 步起损失缩放为 {scale}，可降至 {min_scale}（此前为 {loss_scale}；在 {good_at} 时正常）。",
)
ADVICE = Words(
    "scaler.init_scale: {scale}, scaler.min_scale: {min_scale}; better, precision: bf16, which needs no loss scale",
    "scaler.init_scale: {scale}，scaler.min_scale: {min_scale}；更好的是 precision: bf16，它不需要损失缩放",
)

_USUAL_FLOOR = 2.0**-4


def plans(case: Case, cause: Cause, now: Conditions) -> Iterable[Plan]:
    """Where the gradients are finite at a smaller scale than the run's, and none of them is lost there."""
    found = _scale(case)
    if found is None or now.precision is not None or case.number("loss_scales", "suits", True) is False:
        return
    if case.good("islands"):  # at the scale of before all is well but for these: no reason to press the rest down
        return
    if now.max_scale is not None and now.max_scale <= found:
        return
    floor = min(_USUAL_FLOOR, found, _USUAL_FLOOR if now.min_scale is None else now.min_scale)
    back_to = rungs.first_skipped(case)
    yield rungs.change(
        "scaler_reset",
        Safety.SAFE,
        now,
        {"max_scale": found, "min_scale": floor},
        to_step=back_to,
        temporary=floor == _USUAL_FLOOR and not rungs.relapses(case, cause, "scaler_reset"),
        scale=found,
        min_scale=floor,
        loss_scale=case.reading.loss_scale,
        good_at=", ".join(f"{g:g}" for g in _good(case)),
        from_step=(rungs.newest_step(case) if back_to is None else back_to) + 1,
    )


def _good(case: Case) -> list[float]:
    values = case.number("loss_scales", "good_at", ())
    listed = values if isinstance(values, list | tuple) else ()
    return [n for v in listed if (n := rungs.number(v)) is not None and n > 0]


def _scale(case: Case) -> float | None:
    """The scale to take; None where none is good."""
    good = _good(case)
    if not case.good("loss_scales") or case.reading.loss_scale is None or not good:
        return None
    return rungs.number(case.number("loss_scales", "scale")) or max(good)
