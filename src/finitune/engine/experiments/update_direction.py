"""Update direction: whether the update moves the weights where the optimizer's own first moment says.

What it changes:
    The update is made and undone.

What each outcome says:
    BAD: nearly all elements of a parameter move against the first moment (or the moment against the gradient). No
    rate, clipping, precision or decay does that: a sign is wrong in the optimizer's code.
    GOOD: no parameter does.

What it costs:
    One replay, and copies of up to 65536 elements of each parameter.

Source:
    See engine/direction.py: Kingma & Ba 2015 (arXiv:1412.6980), algorithm 1. The inner product of update and moment is
    positive in every optimizer that descends along a moment, element by element in those of Adam's family and SGD.
"""

from __future__ import annotations

from typing import Any

from finitune.core.incident import Result, Suspect, Trigger, Words
from finitune.engine.case import Case
from finitune.engine.conditions import NotPossible
from finitune.engine.direction import Look, looking
from finitune.engine.experiments._tools import Findings, evidence
from finitune.engine.experiments._updates import standing_before_it
from finitune.engine.experiments.update_share import commit
from finitune.engine.lab import Lab
from finitune.engine.look.codes_update import UPHILL
from finitune.engine.update_check import is_wrong

ORDER = 62
COST = 1.0
SAYS = {
    Result.BAD: Words(
        "{percent} % of {num} elements of {parameter} ({what}) move the wrong way; {count} parameters do.",
        "{parameter}（{what}）的 {num} 个元素中有 {percent} % 朝错误方向移动；共有 {count} 个参数如此。",
    ),
    Result.GOOD: Words(
        "No parameter moves against its moment ({num_parameters} were looked at).",
        "没有参数逆着它的矩移动（查看了 {num_parameters} 个）。",
    ),
}
_BLOCKS, _WIDTH = 1024, 64
_MAX_NAMED = 8


def wanted(case: Case) -> bool:
    """It was seen in the run, or the run goes wrong by degrees and neither its state nor its rate explains it."""
    if case.trigger is Trigger.SILENT:
        return case.finding.code == UPHILL.code
    explained = case.bad("scan_state") or case.good("redone_state") or case.bad("past_loss") or case.good("lower_lr")
    return case.trigger is Trigger.RUNAWAY and not explained


def run(lab: Lab, case: Case) -> Findings:
    """Make the update, look, undo it. Raises NotPossible where nothing can be told of this optimizer, BudgetSpent."""
    with standing_before_it(lab, case):
        look = Look(lab.port.parameters(), _BLOCKS, _WIDTH)
        with looking(lab.port.optimizer, look):
            commit(lab)
        found = look.compare()
    if not any(d.num for d in found):
        raise NotPossible("the first moments of this optimizer cannot be read")
    wrong = sorted((d for d in found if is_wrong(d)), key=lambda d: -d.num_wrong)
    worst = wrong[0] if wrong else max(found, key=lambda d: d.share)
    numbers: dict[str, Any] = {"parameter": worst.name, "what": worst.what, "num": worst.num}
    numbers |= {"percent": 100.0 * worst.share, "count": len({d.name for d in wrong})}
    numbers |= {"num_parameters": len({d.name for d in found if d.num})}
    suspects = {d.name: Suspect("parameter", d.name, {"wrong_share": d.share, "what": d.what}) for d in reversed(wrong)}
    return evidence("update_direction", not wrong, **numbers), tuple(reversed(suspects.values()))[:_MAX_NAMED]
