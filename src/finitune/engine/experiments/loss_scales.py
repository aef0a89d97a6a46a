"""Loss scales: the failing step with the loss multiplied by 2^-12, 1, 2^8 and 2^16.

What it changes:
    The loss scale. The forward pass does not know it; only gradients do.

What each outcome says:
    GOOD: at a smaller scale than the run's the gradients are finite. The scale was too large for this batch, which is
    how a dynamic scale works, or the scaler is stuck.
    BAD: even at the smallest of them they are not. The backward pass overflows by itself, or is NaN.

What it costs:
    One replay for each scale below the run's; one where the smallest is bad already (a larger one is no better).

Source:
    Micikevicius et al. 2018, "Mixed precision training", section 3.2 (arXiv:1710.03740)
"""

from __future__ import annotations

import math
from dataclasses import replace

from finitune.core.incident import Result, Trigger, Words
from finitune.engine.case import Case
from finitune.engine.conditions import NotPossible
from finitune.engine.experiments._tools import Findings, evidence, fails_in_step
from finitune.engine.lab import Lab

ORDER = 44
COST = 2.0
SAYS = {
    Result.GOOD: Words(
        "At the loss scales {good_at} the gradients are finite, at {bad_at} they are not.",
        "损失缩放为 {good_at} 时梯度有限，为 {bad_at} 时不是。",
    ),
    Result.BAD: Words(
        "At no loss scale are the gradients finite (tried: {bad_at}).",
        "任何损失缩放下梯度都不是有限的（试过：{bad_at}）。",
    ),
}
SCALES = (2.0**-12, 2.0**0, 2.0**8, 2.0**16)
"""The smallest lies below every usual floor: a scaler that stands at its floor may just not have far enough to go."""


def wanted(case: Case) -> bool:
    """Gradients failed under a loss scale while the loss is finite, and not in fp32 as well."""
    scaled = case.reading.loss_scale is not None and math.isfinite(case.reading.loss)
    spoilt = case.trigger in (Trigger.GRADIENT, Trigger.SCALE)
    return scaled and spoilt and fails_in_step(case) and not case.bad("fp32") and not case.bad("scan_state")


def run(lab: Lab, case: Case) -> Findings:
    """The step at smaller scales, from the smallest on. Raises NotPossible, BudgetSpent."""
    present = case.reading.loss_scale
    if present is None:
        raise NotPossible("no loss scale is in use")
    smaller = [s for s in SCALES if s < present]
    if not smaller:
        raise NotPossible(f"the loss scale is {present:g} already")
    good_at: list[float] = []
    bad_at = [present]
    for scale in smaller:
        shot = lab.shoot(replace(lab.now, loss_scale=scale))
        (bad_at if shot.bad else good_at).append(scale)
        if shot.bad:
            break
    return evidence("loss_scales", bool(good_at), good_at=good_at, bad_at=sorted(bad_at)), ()
