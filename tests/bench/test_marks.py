"""What counts as noticed, as the right place, cause and remedy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from finitune.bench import marks
from finitune.bench.witness import Said, Witness
from finitune.bench.workload import Expected

EXPECTED = Expected(
    "x", 5, ("NUM400",), (("module", "model.layers.0.mlp"), ("row", "rows.jsonl:3")), ("bf16",), ("OPT",)
)


def witness(**changes: Any) -> Witness:
    made = Witness(SimpleNamespace())  # type: ignore[arg-type]
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def incident(**changes: Any) -> dict[str, Any]:
    record = {"step": 5, "code": "NUM400", "named": ["NUM400"], "where": "", "suspects": [], "remedy": "bf16"}
    return record | {"replays": 3.0, "time_s": 0.1} | changes


@pytest.mark.parametrize(("step", "seen"), [(3, None), (4, 4), (5, 5), (9, 9)])
def test_a_forecast_of_one_step_counts_and_an_earlier_alarm_does_not(step: int, seen: int | None) -> None:
    assert marks.detection(EXPECTED, witness(said=[Said(step, "NUM001")])) == seen


def test_a_fault_before_the_first_step_may_be_told_before_it() -> None:
    early = Expected("x", 0, ("MOD400",))
    assert marks.detection(early, witness(said=[Said(0, "MOD400")])) == 0


def test_the_first_incident_names_the_cause() -> None:
    assert marks.causes(EXPECTED, witness(incidents=[incident()])) == "right"
    assert marks.causes(EXPECTED, witness(incidents=[incident(code="unknown", named=[])])) == "unknown"
    assert marks.causes(EXPECTED, witness(incidents=[incident(code="DAT401", named=["DAT401"])])) == "wrong"


def test_a_forbidden_name_anywhere_is_wrong() -> None:
    second = incident(step=6, code="OPT401", named=["OPT401"])
    assert marks.causes(EXPECTED, witness(incidents=[incident(), second])) == "wrong"


def test_a_forbidden_beginning_does_not_forbid_the_right_code() -> None:
    right = Expected("x", 5, ("OPT400",), never=("OPT",))
    assert marks.causes(right, witness(incidents=[incident(code="OPT400", named=["OPT400"])])) == "right"


def test_findings_without_an_incident_are_never_wrong_but_may_be_right() -> None:
    assert marks.causes(EXPECTED, witness(said=[Said(5, "NUM001")])) == "unknown"
    assert marks.causes(EXPECTED, witness(said=[Said(5, "NUM400")])) == "right"
    assert marks.causes(EXPECTED, witness()) is None


@pytest.mark.parametrize(
    ("kind", "name", "right"),
    [
        ("module", "model.layers.0.mlp", True),
        ("module", "base.model.layers.0.mlp", True),
        ("module", "model.layers.0.mlp.down_proj", False),
        ("module", "model.layers.10.mlp", False),
        ("parameter", "model.layers.0.mlp", False),
        ("row", "rows.jsonl:3#0123456789ab", True),
        ("row", "rows.jsonl:13#0123456789ab", False),
        ("row", "rows.jsonl:33", False),
    ],
)
def test_a_place_is_right_by_kind_and_whole_name(kind: str, name: str, right: bool) -> None:
    assert marks.place(EXPECTED, witness(incidents=[incident(suspects=[[kind, name]])])) is right


def test_the_place_of_a_cause_or_a_finding_may_be_of_any_kind() -> None:
    assert marks.place(EXPECTED, witness(incidents=[incident(where="model.layers.0.mlp")]))
    assert marks.place(EXPECTED, witness(said=[Said(5, "X", (("finding", "rows.jsonl:3#aa"),))]))
    assert marks.place(Expected("x", 5, ("A",)), witness()) is None


def test_what_was_done_first_counts_and_retries_do_not() -> None:
    assert marks.remedy(EXPECTED, witness(incidents=[incident(remedy="retry"), incident()])) is True
    assert marks.remedy(EXPECTED, witness(incidents=[incident(remedy="skip_rows"), incident()])) is False
    assert marks.remedy(EXPECTED, witness(error="Halted: x")) is False
    assert marks.remedy(Expected("x", 5, (), remedies=("halt",)), witness(error="Halted: x")) is True
    assert marks.remedy(Expected("x", 5, (), remedies=("none",)), witness()) is True
    assert marks.remedy(Expected("x", 5, ()), witness()) is None


def test_a_model_that_is_no_model_any_more_is_not_cured() -> None:
    record = marks.fault_marks(EXPECTED, witness(), final=float("nan"), clean=2.0)
    assert record["cured"] is False
    assert record["final_loss"] is None
    assert marks.fault_marks(EXPECTED, witness(), final=2.019, clean=2.0)["cured"] is True
    assert marks.fault_marks(EXPECTED, witness(), final=2.021, clean=2.0)["cured"] is False
    assert marks.fault_marks(EXPECTED, witness(), final=1.5, clean=2.0)["cured"] is True


def test_a_harmless_outlier_let_through_is_no_intervention() -> None:
    passed = witness(incidents=[incident(remedy="let_pass"), incident(remedy=None)])
    assert marks.control_marks("x", passed, steps=10, same_bits=True, plain_s=1.0)["interventions"] == 0
    touched = witness(incidents=[incident(remedy="skip_rows")], error="Halted: x")
    assert marks.control_marks("x", touched, steps=10, same_bits=True, plain_s=1.0)["interventions"] == 2


def test_an_alarm_before_the_fault_is_a_false_alarm_and_no_answer() -> None:
    early = incident(step=2, code="OPT401", named=["OPT401"])
    seen = witness(incidents=[early, incident()])
    assert marks.causes(EXPECTED, seen) == "right"
    assert marks.fault_marks(EXPECTED, seen, final=1.0, clean=1.0)["early_alarms"] == 1


def test_a_later_outlier_that_is_let_through_forbids_nothing() -> None:
    passed = incident(step=9, code="OPT406", named=["OPT406"], remedy="let_pass")
    assert marks.causes(EXPECTED, witness(incidents=[incident(), passed])) == "right"
