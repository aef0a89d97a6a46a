"""Retry: the step is computed again, and nothing else changes.

What it does:
    Nothing but that. For a failure that does not repeat there is nothing to change; it was fine when it was replayed.

What it costs:
    One step of time.

When it is taken back:
    There is nothing to take back. A failure that keeps coming and going halts the run after the allowed relapses.

Source:
    Dixit et al. 2021, "Silent Data Corruptions at Scale"
"""

from __future__ import annotations

from collections.abc import Iterable

from finitune.core.incident import Cause, Safety, Verdict, Words
from finitune.engine.case import Case
from finitune.engine.conditions import Conditions
from finitune.engine.plan import Plan
from finitune.engine.remedies import _rungs as rungs

SAFETY = Safety.SAFE
SAYS = Words(
    "Step {step} is computed again; nothing is changed.",
    "重新计算第 {step} 步；不作任何改变。",
)
ADVICE = Words(
    "If it comes back, look at the machine's error counters and at overlapped communication.",
    "若再次出现，请查看机器的错误计数和与计算重叠的通信。",
)

_CORRUPT_STATE = "SYS403"


def plans(case: Case, cause: Cause, now: Conditions) -> Iterable[Plan]:
    """Only for a failure that did not repeat; a tensor that is bad again after a retry must be mended."""
    relapsed = cause.code == _CORRUPT_STATE and rungs.relapses_at(case, cause, "retry") > 0
    if case.verdict is Verdict.NOT_REPRODUCED and not relapsed:
        yield Plan("retry", Safety.SAFE, now, data={"step": case.reading.step})
