"""Update share: how far the update moves each parameter, in units of its norm.

What it changes:
    The update is made and undone.

What each outcome says:
    BAD: a parameter moves by more than a tenth of its norm in one step, or to something that is not finite: rate,
    moments or gradient are far too large for it.
    GOOD: all move by less. Healthy training moves weights by about a thousandth.

What it costs:
    One replay and a copy of the weights.

Source:
    The usual rule of 1e-3: https://cs231n.github.io/neural-networks-3/#ratio . Norms below those of weights of
    0.01 count as that: what starts at 0 (LoRA's B, biases) has no norm of its own yet.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Any

import torch

from finitune.core.incident import Result, Suspect, Trigger, Words
from finitune.core.types import Reading
from finitune.engine.case import Case
from finitune.engine.conditions import NotPossible
from finitune.engine.experiments._tools import Findings, evidence
from finitune.engine.experiments._updates import of_the_loss, standing_before_it
from finitune.engine.lab import Lab
from finitune.engine.monitor import read

ORDER = 46
COST = 1.0
SAYS = {
    Result.BAD: Words(
        "The update moves {parameter} by {ratio} of its norm (in the median, parameters move by {median_ratio}).",
        "更新使 {parameter} 移动了其范数的 {ratio}（各参数的中位数为 {median_ratio}）。",
    ),
    Result.GOOD: Words(
        "The update moves no parameter by more than {ratio} of its norm ({parameter}; median {median_ratio}).",
        "更新使任何参数移动都不超过其范数的 {ratio}（{parameter}；中位数 {median_ratio}）。",
    ),
}
LIMIT = 0.1
FLOOR_RMS = 0.01
_TRIGGERS = (Trigger.UPDATE, Trigger.RUNAWAY, Trigger.OUTLIER, Trigger.SILENT)


def wanted(case: Case) -> bool:
    """The update is under suspicion, and nothing has explained it yet."""
    explained = case.good("adam_eps") or case.bad("scan_state") or case.bad("supervised_tokens")
    return case.trigger in _TRIGGERS and not explained and not of_the_loss(case)


def run(lab: Lab, case: Case) -> Findings:
    """Make the update, measure, undo it. Raises NotPossible where the gradients are not finite, BudgetSpent."""
    with standing_before_it(lab, case):
        was = {name: p.detach().clone() for name, p in lab.port.parameters()}
        commit(lab)
        ratios = {name: _ratio(was[name], p.detach()) for name, p in lab.port.parameters()}
    if not ratios:
        raise NotPossible("nothing is trained")
    worst = max(ratios, key=lambda n: _badness(ratios[n]))
    ratio, usual = ratios[worst], median(map(_badness, ratios.values()))
    good = ratio <= LIMIT
    data: dict[str, Any] = {"parameter": worst, "ratio": ratio, "median_ratio": usual}
    suspects = () if good else (Suspect("parameter", worst, {"update_ratio": ratio}),)
    return evidence("update_share", good, **data), suspects


def commit(lab: Lab) -> Reading:
    """The step at hand with its update, which the caller undoes. Raises NotPossible where its numbers are bad."""
    lab.budget.charge(1.0)
    reading = read(lab.port.forward_backward())
    if not (math.isfinite(reading.loss) and math.isfinite(reading.grad_norm)):
        lab.port.abort()
        raise NotPossible("loss or gradients of this step are not finite, so there is no update to look at")
    lab.port.commit(reading)
    return reading


def _ratio(was: torch.Tensor, now: torch.Tensor) -> float:
    """||change|| / ||weights||, in fp32; NaN or inf where the change is not finite."""
    if not was.numel():
        return 0.0
    floor = FLOOR_RMS * math.sqrt(was.numel())
    norm = torch.linalg.vector_norm(was.float()).item()
    moved = torch.linalg.vector_norm(now.float() - was.float()).item()
    return float(moved / max(norm, floor))


def _badness(ratio: float) -> float:
    return ratio if math.isfinite(ratio) else math.inf
