"""Drop batch: the batch that failed is given up; the run goes on with the next.

What it does:
    Moves past the batch without an update. Its rows stay in the journal.

What it costs:
    The rows of one step (nothing, where none of its tokens was supervised). It cures nothing: it is right only where
    other batches are fine on the same weights.

When it is taken back:
    The rows come up again in the next epoch.

Source:
    Chowdhery et al. 2022, "PaLM", section 5.1 (batches around a spike are skipped)
"""

from __future__ import annotations

from collections.abc import Iterable

from finitune.core.incident import Cause, Safety, Trigger, Words
from finitune.engine.case import Case
from finitune.engine.conditions import Conditions
from finitune.engine.plan import BatchFate, Plan

SAFETY = Safety.LOSSY
SAYS = Words(
    "The batch of step {step} is given up ({count} rows or packs); other batches are fine.",
    "放弃第 {step} 步的这一批（{count} 行或包）；其他批次正常。",
)
ADVICE = Words(
    "Look at the rows of step {step} in the journal.",
    "在日志中查看第 {step} 步的数据行。",
)

_NOTHING_SUPERVISED = "DAT400"
_UNFAILED = (Trigger.RUNAWAY, Trigger.FORECAST, Trigger.SILENT)


def plans(case: Case, cause: Cause, now: Conditions) -> Iterable[Plan]:
    """Where not the state is at fault: nothing supervised, rows that fail alone, or others that are fine.

    Without a known cause too: the proof computes the batches to come and tells whether they are.
    """
    empty = cause.code == _NOTHING_SUPERVISED and cause.named
    others_fine = cause.code == "unknown" or case.good("known_good_batch") or case.good("rows")
    if case.trigger in _UNFAILED or not (empty or others_fine):
        return
    data = {"step": case.reading.step, "count": case.facts.get("num_units", "-")}
    safety = Safety.SAFE if empty else Safety.LOSSY
    yield Plan("drop_batch", safety, now, fate=BatchFate.SKIP, data=data)
