"""Skip rows: the rows that fail alone are put into quarantine, and the step is computed without them.

What it does:
    Adds the content hashes of the rows to the quarantine. They are left out wherever they come up: in this step,
    after a resume, in a later epoch, under another order.

What it costs:
    What these rows would have taught. The others of the batch are kept.

When it is taken back:
    Never by itself. A row that was repaired has another hash and comes in again.

Source:
    https://github.com/prs-eth/Marigold/issues/111 (inputs with NaN: a tenth of the rate did not help)
"""

from __future__ import annotations

from collections.abc import Iterable

from finitune.core.incident import Cause, Safety, Words
from finitune.core.types import RowId
from finitune.engine.case import Case
from finitune.engine.conditions import Conditions
from finitune.engine.plan import Plan
from finitune.engine.remedies import _rungs as rungs

SAFETY = Safety.LOSSY
SAYS = Words(
    "{count} rows are put into quarantine ({rows}), and step {step} is computed without them.",
    "隔离 {count} 行（{rows}），第 {step} 步在没有它们的情况下计算。",
)
ADVICE = Words(
    "Repair these rows or take them out of the data: {rows}.",
    "修复这些行，或将其从数据中移除：{rows}。",
)

_NOTHING_SUPERVISED = "DAT400"


def plans(case: Case, cause: Cause, now: Conditions) -> Iterable[Plan]:
    """Where bisection found rows that fail alone and the rest together is good, or a micro-batch has no target."""
    texts = _without_target(case) if cause.code == _NOTHING_SUPERVISED else _failing(case)
    digests = [d for t in texts if (d := _digest(t)) is not None and d not in now.quarantine]
    if not digests:
        return
    quarantine = (*now.quarantine, *dict.fromkeys(digests))
    yield rungs.change(
        "skip_rows",
        Safety.LOSSY,
        now,
        {"quarantine": quarantine},
        count=len(quarantine) - len(now.quarantine),
        rows=rungs.listed(texts),
        step=case.reading.step,
    )


def _failing(case: Case) -> tuple[str, ...]:
    if not case.good("rows") or case.number("rows", "rest_good") is False:
        return ()
    bad, total = rungs.number(case.number("rows", "num_bad")), rungs.number(case.number("rows", "num_units"))
    every = bad is not None and total is not None and bad >= total
    return () if every else rungs.names(case.number("rows", "rows", ()))


def _without_target(case: Case) -> tuple[str, ...]:
    """Rows of micro-batches without a target, where the step has others: those are still learnt from."""
    some_left = case.good("supervised_tokens")
    return rungs.names(case.number("supervised_tokens", "empty_rows", ())) if some_left else ()


def _digest(text: str) -> str | None:
    try:
        return RowId.parse(text).digest
    except ValueError:
        return None
