"""An update seen to go uphill names the optimizer; a loss that changed by the number of micro-batches its formula."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engine.causes.scenes import case
from finitune.core.incident import Evidence, Result, Trigger
from finitune.core.types import Finding, Severity
from finitune.engine.case import Case
from finitune.engine.diagnose import diagnose


def silent(code: str, experiment: str, result: Result, **numbers: Any) -> Case:
    of = case(Trigger.SILENT, finding=Finding(code, Severity.ERROR, "w"))
    return replace(of, evidence={experiment: Evidence(experiment, result, numbers)})


def named(of: Case) -> list[str]:
    return [c.code for c in diagnose(of).causes if c.named]


def test_an_update_that_goes_uphill_on_a_replay_is_the_optimizers() -> None:
    of = silent("OPT120", "update_direction", Result.BAD, parameter="model.w", percent=100.0)
    assert named(of) == ["OPT404"]
    assert diagnose(of).causes[0].where == "model.w"


def test_one_that_is_not_seen_again_names_nothing() -> None:
    assert named(silent("OPT120", "update_direction", Result.GOOD, parameter="model.w", percent=0.0)) == []


@pytest.mark.parametrize("trigger", [Trigger.SILENT, Trigger.RUNAWAY, Trigger.OUTLIER])
def test_a_past_that_changed_by_the_number_of_micro_batches_is_the_normalisation(trigger: Trigger) -> None:
    of = replace(silent("OPT121", "past_loss", Result.BAD, by_micros=True, factor=4.0, micros=4), trigger=trigger)
    assert named(of) == ["OPT403"]
    assert diagnose(of).causes[0].data["ratio"] == 4.0


@pytest.mark.parametrize(("result", "by_micros"), [(Result.BAD, False), (Result.GOOD, False)])
def test_a_past_that_changed_otherwise_or_not_at_all_names_nothing(result: Result, by_micros: bool) -> None:
    assert named(silent("OPT121", "past_loss", result, by_micros=by_micros, factor=2.5, micros=4)) == []
