"""Loss scales: the largest scale at which the failing step's gradients are finite, and what of them is left there.

What it changes:
    The loss scale. The forward pass does not know it; only gradients do.

What each outcome says:
    GOOD: at a smaller scale than the run's the gradients are finite. The scale was too large, which is how a dynamic
    scale works; or one part of the backward pass is so loud that no scale suits it and the rest. The gradients of that
    scale, compared with those of fp32, tell the two apart: ``error`` is the norm of the difference over that of the
    gradients, and ``suits`` says whether it is no more than roundings make.
    BAD: even at the smallest scale they are not finite. The backward pass overflows by itself, or is NaN.

What it costs:
    One replay where the smallest scale is bad already (a larger one is no better). Else the exponent is bisected, to
    within a factor of 16: three to five more; and one in fp32.

Source:
    Micikevicius et al. 2018, "Mixed precision training", section 3.2 (arXiv:1710.03740): small gradients that round to
    0 are what a scale is there to prevent. Measured on four small models: the error stays at 2^-11 down to scale 1,
    is 2^-8 at 2^-5, 2^-5 at 2^-8, and 1 from 2^-18 on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from finitune.core.incident import Result, Trigger, Words
from finitune.engine.case import Case
from finitune.engine.conditions import Conditions, NotPossible
from finitune.engine.experiments._tools import Findings, evidence, fails_in_step
from finitune.engine.lab import Lab
from finitune.engine.monitor import read
from finitune.engine.scaler import USUAL_SCALE

ORDER = 44
COST = 6.0
SAYS = {
    Result.GOOD: Words(
        "At loss scale {largest} the gradients are finite ({lost} of them lost to it), at {least} not.",
        "损失缩放为 {largest} 时梯度有限（因此损失 {lost}），为 {least} 时不是。",
    ),
    Result.BAD: Words(
        "At no loss scale are the gradients finite (tried: {bad_at}).",
        "任何损失缩放下梯度都不是有限的（试过：{bad_at}）。",
    ),
}
SMALLEST = 2.0**-24
"""The smallest number of fp16: what a scale below it would leave of a gradient of 1 is 0."""
NEAR_BITS = 4
"""The search ends where scales that are good and bad are as near as this."""
ROOM = 4.0
"""Batches vary: there is room for gradients so many times as large at the scale that is chosen."""
MOST_ERROR = 2.0**-6
"""fp16 rounds to 2^-11; some thousand roundings one after another add up to sqrt(1000) times that."""
_FOR_THE_REST = 12
"""Replays besides those of the way back: the failing step, some past it, and the experiments that are still to come."""

_Gradients = Mapping[str, Tensor]


def wanted(case: Case) -> bool:
    """Gradients failed under a loss scale while the loss is finite, and not in fp32 as well."""
    scaled = case.reading.loss_scale is not None and math.isfinite(case.reading.loss)
    spoilt = case.trigger in (Trigger.GRADIENT, Trigger.SCALE)
    return scaled and spoilt and fails_in_step(case) and not case.bad("fp32") and not case.bad("scan_state")


def run(lab: Lab, case: Case) -> Findings:
    """The search. Raises NotPossible, BudgetSpent."""
    present = case.reading.loss_scale
    if present is None:
        raise NotPossible("no loss scale is in use")
    if not present > SMALLEST:
        raise NotPossible(f"the loss scale is {present:g} already")
    search = _Search(lab, [present])
    search.go(present)
    if not search.good_at:
        return evidence("loss_scales", False, good_at=[], bad_at=sorted(search.bad_at)), ()
    scale = max(search.good_at) / ROOM
    error = _error(search.gradients, _exact(lab))
    return evidence(
        "loss_scales",
        True,
        good_at=sorted(search.good_at),
        bad_at=sorted(search.bad_at),
        scale=scale,
        error=error,
        # What rounds to 0 is proportional to the scale: at a smaller one so much more of it.
        suits=error is None or ROOM * error <= MOST_ERROR,
        lost="-" if error is None else f"{100 * error:.2g} %",
        largest=max(search.good_at),
        least=min(search.bad_at),
        back_to=_first_skipped(lab, case),
    ), ()


class _Search:
    """Scales that were tried; the gradients of the largest good one, the scale divided out."""

    def __init__(self, lab: Lab, bad_at: list[float]) -> None:
        self.lab, self.good_at, self.bad_at = lab, list[float](), bad_at
        self.gradients: _Gradients | None = None

    def go(self, present: float) -> None:
        """The smallest first, then the usual one where the run's is far above it, then the exponent bisected."""
        if not self._fits(SMALLEST):
            return
        usual = USUAL_SCALE * ROOM
        if present > usual and self._fits(usual):
            return
        low, high = math.log2(SMALLEST), math.log2(min(self.bad_at))
        while high - low > NEAR_BITS:
            middle = math.floor((low + high) / 2)
            low, high = (middle, high) if self._fits(2.0**middle) else (low, middle)

    def _fits(self, scale: float) -> bool:
        found = _gradients(self.lab, replace(self.lab.now, loss_scale=scale), scale)
        if found is None:
            self.bad_at.append(scale)
            return False
        self.good_at.append(scale)
        self.gradients = found  # good ones come in rising order
        return True


def _gradients(lab: Lab, conditions: Conditions, scale: float) -> _Gradients | None:
    """The gradients of the failing step, the scale divided out, in fp32; None where the step is bad."""
    lab.budget.charge(1.0)
    with lab.under(conditions):
        try:
            if lab.case.is_bad(read(lab.port.forward_backward())):
                return None
            return {n: p.grad.detach().float() / scale for n, p in lab.port.parameters() if p.grad is not None}
        finally:
            lab.port.abort()


def _exact(lab: Lab) -> _Gradients | None:
    """Those of fp32; None where that cannot be had."""
    try:
        return _gradients(lab, replace(lab.now, precision="fp32", loss_scale=1.0), 1.0)
    except NotPossible:
        return None


@torch.no_grad()
def _error(found: _Gradients | None, exact: _Gradients | None) -> float | None:
    """The norm of the difference over that of the exact ones; None where it cannot be told."""
    if found is None or exact is None or found.keys() != exact.keys() or not exact:
        return None
    distance = math.hypot(*(float(torch.linalg.vector_norm(found[n] - exact[n])) for n in exact))
    length = math.hypot(*(float(torch.linalg.vector_norm(exact[n])) for n in exact))
    return distance / length if math.isfinite(distance) and 0 < length < math.inf else None


def _first_skipped(lab: Lab, case: Case) -> int | None:
    """Batches used up before the first of those that were given up one after another; None where it cannot be had, or
    the budget does not reach from there past the failing step.
    """
    num = case.facts.get("num_skipped")
    if not isinstance(num, int) or not 0 < num <= lab.before.step or not lab.budget.left(num + _FOR_THE_REST):
        return None
    first = lab.before.step - num
    return first if lab.state_at(first) is not None else None
