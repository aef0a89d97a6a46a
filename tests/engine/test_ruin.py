"""Which silent faults end a run, and which are only told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from finitune.core.incident import Cause, Diagnosis, Trigger
from finitune.engine.ruin import plan_of, ruins


def incident(trigger: Trigger, name: str, *, named: bool = True) -> Any:
    cause = Cause(name, "OPT000", "R", 0.9, named)
    return SimpleNamespace(trigger=trigger, diagnosis=Diagnosis((cause,)))


@pytest.mark.parametrize(
    ("trigger", "name", "expected"),
    [
        (Trigger.SILENT, "optimizer_bug", True),
        (Trigger.RUNAWAY, "optimizer_bug", True),
        (Trigger.SILENT, "loss_normalisation", False),
        (Trigger.RUNAWAY, "loss_normalisation", False),
        (Trigger.SILENT, "no_gradient", False),
        (Trigger.RUNAWAY, "no_gradient", True),
        (Trigger.RUNAWAY, "learning_rate", False),
        (Trigger.OUTLIER, "optimizer_bug", False),
    ],
)
def test_every_further_step_is_lost_where_the_cause_says_so(trigger: Trigger, name: str, expected: bool) -> None:
    assert ruins(incident(trigger, name)) is expected
    assert not ruins(incident(trigger, name, named=False))


def test_that_nothing_fails_proves_no_plan_for_a_silent_fault_without_a_remedy() -> None:
    found: Any = SimpleNamespace(plan=object())
    assert plan_of(incident(Trigger.SILENT, "optimizer_bug"), found) is None
    assert plan_of(incident(Trigger.SILENT, "optimizer_bug", named=False), found) is found.plan
    assert plan_of(incident(Trigger.RUNAWAY, "optimizer_bug"), found) is found.plan
    assert plan_of(incident(Trigger.OUTLIER, "bad_row"), None) is None
