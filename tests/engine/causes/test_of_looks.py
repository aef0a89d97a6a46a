"""What a look found before the first step: the causes that name it, and the plans that repair it."""

from __future__ import annotations

import pytest

from engine.causes.scenes import case, evidence
from finitune.core.incident import Safety, Suspect, Trigger
from finitune.core.types import Finding, Severity
from finitune.engine.case import Case
from finitune.engine.conditions import AS_CONFIGURED
from finitune.engine.diagnose import diagnose
from finitune.engine.plan import Operation
from finitune.engine.remedying import candidates

HEAD, FREQUENCIES = "lm_head.weight", "model.rotary_emb.inv_freq"
ROWS = {"first": "head.out", "tables": ["head.out", "emb"], "tokens": [61, 60], "was": 25.0, "loss": 5.7}
ORIGINAL = "model.rotary_emb.original_inv_freq"
BUFFERS = {"first": FREQUENCIES, "buffers": [FREQUENCIES, ORIGINAL], "was": 2.5, "loss": 2.1}


def of_rows(good: bool) -> Case:
    found = evidence("mean_rows" if good else "", "" if good else "mean_rows", mean_rows=ROWS)
    loud = Suspect("parameter", "head.out", {"what": "row_norm", "row": 61, "amax": 12.5})
    finding = Finding("MOD113", Severity.WARNING, "head.out", {})
    return case(Trigger.SILENT, evidence=found, suspects=(loud,) if good else (), finding=finding, step=1)


def of_buffers(good: bool) -> Case:
    found = evidence("computed_buffers" if good else "", "" if good else "computed_buffers", computed_buffers=BUFFERS)
    lost = Suspect("buffer", FREQUENCIES, {"what": "not_as_computed", "index": "0", "value": 0.0})
    finding = Finding("MOD112", Severity.ERROR, FREQUENCIES, {})
    return case(Trigger.SILENT, evidence=found, suspects=(lost,), finding=finding, step=1)


def test_rows_are_named_by_the_table_whatever_it_is_called() -> None:
    top = diagnose(of_rows(True)).top
    assert top is not None
    assert (top.code, top.named, top.where, top.reasons_for) == ("MOD402", True, "head.out", ("mean_rows",))
    assert (top.data["tokens"], top.data["amax"]) == ("61, 60", 12.5)


def test_a_lost_buffer_is_a_bad_weight_from_the_start() -> None:
    top = diagnose(of_buffers(True)).top
    assert top is not None
    assert (top.code, top.named, top.where) == ("MOD400", True, FREQUENCIES)
    assert (top.data["index"], top.data["value"]) == ("0", 0.0)


@pytest.mark.parametrize("of", [of_rows(False), of_buffers(False)])
def test_what_the_loss_does_not_bear_out_is_not_named_and_not_repaired(of: Case) -> None:
    found = diagnose(of)
    assert not found.known
    assert "repair_tensor" not in {p.remedy for p in candidates(of, found, AS_CONFIGURED, "auto")}


@pytest.mark.parametrize(
    ("of", "policy", "names"),
    [
        (of_rows(True), "auto", ("head.out", "emb")),
        (of_rows(True), "safe", None),
        (of_buffers(True), "safe", (FREQUENCIES, ORIGINAL)),
        (of_buffers(True), "observe", None),
    ],
)
def test_the_repair_is_planned_where_the_policy_allows_what_it_costs(of: Case, policy: str, names: object) -> None:
    plans = [p for p in candidates(of, diagnose(of), AS_CONFIGURED, policy) if p.remedy == "repair_tensor"]
    assert [p.mends[0].names for p in plans] == ([] if names is None else [names])
    for plan in plans:
        assert plan.mends[0].what is Operation.REPAIR
        assert plan.safety is (Safety.LOSSY if "head.out" in plan.mends[0].names else Safety.SAFE)
