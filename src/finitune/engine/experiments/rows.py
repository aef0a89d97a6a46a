"""Rows: the failing step on parts of its batch, bisected down to single rows and, in a row, to the token.

What it changes: the rows. Padding width, batch size and kernels stay, because the other places hold copies.
GOOD: some rows fail on their own and the rest together is good: skipping them cures this step. BAD: every row fails,
nearly every one does, or none does without the others; then the data is not to blame.
Cost: two steps for each halving, about 2 log2(rows) for one culprit; less where the localisation named the rows.
Source: Dorfman 1943 (group testing).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finitune.core.incident import Evidence, Result, Suspect, Trigger, Words
from finitune.engine.case import Case
from finitune.engine.causes import _signs as signs
from finitune.engine.lab import BudgetSpent, Lab
from finitune.engine.port import Unit
from finitune.engine.rows import RowsFound, find_rows, find_span

ORDER = 50
COST = 8.0
SAYS: Mapping[Result, Words] = {
    Result.GOOD: Words(
        "{num_bad} of {num_units} parts of the batch fail on their own ({first}); the rest together is good.",
        "批次的 {num_units} 个部分中有 {num_bad} 个单独就会失败（{first}）；其余部分合在一起是正常的。",
    ),
    Result.BAD: Words(
        "No single rows are to blame: {num_bad} of {num_units} parts of the batch were seen to fail.",
        "不能归咎于个别数据行：批次的 {num_units} 个部分中，观察到 {num_bad} 个会失败。",
    ),
}
_TRIGGERS = (Trigger.LOSS, Trigger.GRADIENT, Trigger.SCALE, Trigger.UPDATE, Trigger.OUTLIER)
_MAX_SPANS = 2

_BATCHES = 2
"""So many different batches failed in a row: no row is to blame."""


def wanted(case: Case) -> bool:
    """The step itself fails, its batch has parts, and other batches do not all fail as well.

    The rows of a micro-batch without targets are known.
    """
    if case.trigger not in _TRIGGERS or case.facts.get("num_units") == 1 or signs.empty_micro(case) is not None:
        return False
    others_fail = case.bad("known_good_batch") and not case.number("known_good_batch", "num_good", 0)
    if (case.facts.get("num_skipped") or 0) >= _BATCHES:
        return False
    return not others_fail and not case.bad("supervised_tokens")


def run(lab: Lab, case: Case) -> tuple[Evidence, tuple[Suspect, ...]]:
    """Find the rows and their spans. Raises NotPossible, BudgetSpent."""
    spent = lab.budget.replays
    units = lab.port.units()
    found = find_rows(lab, case)
    suspects: list[Suspect] = []
    if found.isolated:
        spans = _spans(lab, case, found)
        for number in found.units:
            suspects += _suspects(units[number], spans.get(number))
    numbers = _numbers(units, found)
    result = Result.GOOD if found.isolated else Result.BAD
    return Evidence("rows", result, numbers, lab.budget.replays - spent), tuple(suspects)


def _spans(lab: Lab, case: Case, found: RowsFound) -> dict[int, tuple[int, int]]:
    """Token spans of the first culprits, as far as the budget allows."""
    spans: dict[int, tuple[int, int]] = {}
    if case.suspects_of("input"):
        return spans  # a number beside the tokens is bad: it is so for every prefix
    try:
        for number in found.units[:_MAX_SPANS]:
            span = find_span(lab, case, number)
            if span is not None:
                spans[number] = span
    except BudgetSpent:
        pass  # the rows are known; the spans are an extra
    except Exception:  # noqa: BLE001 - a model or loss that cannot take a row without targets
        lab.port.abort()
    return spans


def _suspects(unit: Unit, span: tuple[int, int] | None) -> list[Suspect]:
    data: dict[str, Any] = {"micro": unit.micro, "index": unit.index, "by": "rows", "num_in_unit": len(unit.rows)}
    data["span"] = list(span) if span else None
    kinds = ("row", "tokens") if span else ("row",)
    return [Suspect(kind, str(row), data) for row in unit.rows for kind in kinds]


def _numbers(units: Sequence[Unit], found: RowsFound) -> dict[str, Any]:
    rows = [str(row) for number in found.units for row in units[number].rows]
    numbers: dict[str, Any] = {"units": list(found.units), "rows": rows, "first": rows[0] if rows else "-"}
    numbers |= {"num_units": found.num_units, "num_bad": len(found.units), "rest_good": found.rest_good}
    numbers |= {"combinations": [list(c) for c in found.combinations], "too_many": found.too_many}
    return {**numbers, "complete": found.complete, "every": found.every, "num_shots": found.num_shots}
