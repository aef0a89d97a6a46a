"""Halt: the run stops at the last good state.

What it does:
    Nothing to the state. The failing step stays undone; weights and moments are those of before it, all finite.

What it costs:
    Time, until someone looks. A run that goes on with a failure that is not understood costs more.

When it is taken back:
    By resuming the run.

Source:
    Saltzer & Schroeder 1975, "The Protection of Information in Computer Systems" (fail-safe defaults)
"""

from __future__ import annotations

from collections.abc import Iterable

from finitune.core.incident import Cause, Safety, Words
from finitune.engine.case import Case
from finitune.engine.conditions import Conditions
from finitune.engine.plan import Plan

SAFETY = Safety.SAFE
SAYS = Words(
    "The run stops before step {step}, with the last good state.",
    "在第 {step} 步之前停止，保留最后的正常状态。",
)
ADVICE = Words(
    "Read the incident and run it again from its capsule: finitune replay CAPSULE.",
    "查看该事件，并从其 capsule 重新运行：finitune replay CAPSULE。",
)


def plans(case: Case, cause: Cause, now: Conditions) -> Iterable[Plan]:  # noqa: ARG001
    """Always possible."""
    yield Plan("halt", Safety.SAFE, now, halts=True, data={"step": case.reading.step})
