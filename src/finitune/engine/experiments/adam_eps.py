"""Adam's eps: the step and its update with an eps that half precision can hold.

What it changes:
    eps, to 1e-4, for one update that is undone.

What each outcome says:
    GOOD: the update stays finite. In fp16 an eps of 1e-8 is 0 (the smallest subnormal is 6e-8), so a weight whose
    squared gradient underflows is divided by 0.
    BAD: the division is not what spoils the update.

What it costs:
    One replay.

Source:
    Measured: pure fp16 AdamW with eps 1e-8 is spoilt at its first update, with 1e-4 it trains;
    https://docs.pytorch.org/docs/stable/generated/torch.optim.AdamW.html (the formula)
"""

from __future__ import annotations

from dataclasses import replace

from finitune.core.incident import Result, Trigger, Words
from finitune.engine.case import Case
from finitune.engine.conditions import NotPossible
from finitune.engine.experiments._tools import Findings, evidence, is_adam, is_half, numbers
from finitune.engine.lab import Lab

ORDER = 22
COST = 1.0
SAYS = {
    Result.GOOD: Words(
        "With eps {eps} instead of {was} the update stays finite.",
        "把 eps 从 {was} 改为 {eps} 后，更新保持有限。",
    ),
    Result.BAD: Words(
        "With eps {eps} instead of {was} the update is spoilt as before.",
        "把 eps 从 {was} 改为 {eps} 后，更新仍然损坏。",
    ),
}
EPS = 1e-4


def wanted(case: Case) -> bool:
    """The update of an Adam spoils half weights, and eps is smaller than the one to try; a pair is no Adam's eps."""
    eps = case.facts.get("adam_eps")
    small = eps is None or (isinstance(eps, int | float) and eps < EPS)
    return case.trigger is Trigger.UPDATE and is_adam(case) and is_half(case) and small


def run(lab: Lab, case: Case) -> Findings:
    """The step with its update under another eps. Raises NotPossible, BudgetSpent."""
    if lab.now.adam_eps is not None and lab.now.adam_eps >= EPS:
        raise NotPossible(f"eps is {lab.now.adam_eps} already")
    shot = lab.shoot(replace(lab.now, adam_eps=EPS))
    was = lab.now.adam_eps or case.facts.get("adam_eps")
    return evidence("adam_eps", not shot.bad, eps=EPS, was=was, **numbers(shot)), ()
