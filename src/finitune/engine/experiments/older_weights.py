"""Older weights: the same batch on the states of 1 and of 8 steps before.

What it changes:
    The training state, back in time.

What each outcome says:
    GOOD: on an older state the batch is good, so the steps in between spoilt it; how far back says how far to go.
    BAD: the batch fails there too. Going back does not help; what is bad was so before.

What it costs:
    One replay, two where 1 step back is not good or its loss is far off; and what it takes to bring the state back.

Source:
    Measured: a run-away is often still finite 1 step back at a loss of millions, and sound only 8 steps back
"""

from __future__ import annotations

import math

from finitune.core.incident import Result, Suspect, Words
from finitune.engine.case import Case
from finitune.engine.conditions import NotPossible
from finitune.engine.experiments._course import limit_of
from finitune.engine.experiments._tools import Findings, evidence, fails_in_step, precision_explains
from finitune.engine.lab import Lab, Shot

ORDER = 66
COST = 2.0
SAYS = {
    Result.GOOD: Words(
        "On the weights after step {newest_good} the same batch is good (tried: {steps}; losses {losses}).",
        "在第 {newest_good} 步之后的权重上同一批次正常（试过：{steps}；损失 {losses}）。",
    ),
    Result.BAD: Words(
        "On older weights (after steps {steps}) the same batch fails as well.",
        "在更早的权重上（第 {steps} 步之后）同一批次同样失败。",
    ),
}
BACK = (1, 8)


def wanted(case: Case) -> bool:
    """Batches that went well fail too, and precision does not explain it."""
    return fails_in_step(case) and case.bad("known_good_batch") and not precision_explains(case) and _open(case)


def _open(case: Case) -> bool:
    return not (case.bad("scan_state") or case.good("math_attention") or case.good("padding"))


def run(lab: Lab, case: Case) -> Findings:
    """The batch on older states, the newest first. Raises NotPossible where none can be had, BudgetSpent."""
    steps: list[int] = []
    losses: list[float] = []
    good: list[int] = []
    for step in [lab.before.step - back for back in BACK if lab.before.step >= back]:
        shot = _on_state(lab, step)
        if shot is None:
            continue
        steps.append(step)
        losses.append(shot.reading.loss)
        if not shot.bad:
            good.append(step)
            if _is_sound(case, shot.reading.loss):
                break
    if not steps:
        raise NotPossible("no older state can be had")
    newest = max(good, default=None)
    found = evidence("older_weights", bool(good), steps=steps, good=good, newest_good=newest, losses=losses)
    return found, () if newest is None else (Suspect("step", str(newest + 1), {"good_at": newest}),)


def _on_state(lab: Lab, step: int) -> Shot | None:
    snapshot = lab.state_at(step)
    if snapshot is None:
        return None
    with lab.standing_at(snapshot):
        return lab.shoot(lab.now)


def _is_sound(case: Case, loss: float) -> bool:
    usual = case.past.get("median_loss")
    return usual is None or not math.isfinite(usual) or loss <= limit_of(usual)
