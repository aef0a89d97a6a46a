"""Padding: the failing step a little wider or narrower.

What it changes:
    The tokens of padding at the right: 1 and 8 more, 1 fewer. No token that counts is touched.

What each outcome says:
    GOOD: at some width the step is good. Only a kernel that treats this length wrongly, or a mask that leaves a row
    nothing to look at, depends on that.
    BAD: the width has no part in it.

What it costs:
    Up to three replays.

Source:
    https://github.com/pytorch/pytorch/issues/103749 (fully masked rows);
    https://github.com/NVIDIA-NeMo/Automodel/pull/2687 (a kernel that fails at certain lengths)
"""

from __future__ import annotations

from dataclasses import replace

from finitune.core.incident import Result, Words
from finitune.engine.case import Case
from finitune.engine.conditions import NotPossible
from finitune.engine.experiments._course import ran_away
from finitune.engine.experiments._tools import Findings, evidence, fails_in_step, may_be_attention, precision_explains
from finitune.engine.lab import Lab

ORDER = 62
COST = 3.0
SAYS = {
    Result.GOOD: Words(
        "With {widths_good} tokens of padding more or fewer the step is good (with {widths_bad} it is not).",
        "填充增减 {widths_good} 个词元时该步正常（{widths_bad} 时不正常）。",
    ),
    Result.BAD: Words(
        "With more or less padding ({widths_bad} tokens) the step fails as before.",
        "增减填充（{widths_bad} 个词元）后该步仍然失败。",
    ),
}
CHANGES = (1, 8, -1)


def wanted(case: Case) -> bool:
    """The width may matter: attention is suspected, and neither its kernel nor single rows are proved to be it."""
    if not fails_in_step(case) or not may_be_attention(case) or precision_explains(case) or _is_other(case):
        return False
    kernel = case.good("math_attention") and not case.good("rows")
    rows = case.bad("math_attention") and case.good("rows")
    return not (kernel or rows)


def _is_other(case: Case) -> bool:
    return case.bad("scan_state") or ran_away(case)


def run(lab: Lab, case: Case) -> Findings:  # noqa: ARG001
    """The step at other widths. Raises NotPossible where there is none, BudgetSpent."""
    good: list[int] = []
    bad: list[int] = []
    reason = NotPossible("there is no padding")
    for change in CHANGES:
        try:
            shot = lab.shoot(replace(lab.now, extra_padding=lab.now.extra_padding + change))
        except NotPossible as refused:
            reason = refused
            continue
        (bad if shot.bad else good).append(change)
    if not good and not bad:
        raise reason
    return evidence("padding", bool(good), widths_good=good, widths_bad=bad), ()
