"""The nouns: frozen, JSON-able, named by content."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finitune.core.types import Finding, Judgement, Reading, RowId, Severity, Verdict


def test_a_row_is_named_by_source_number_and_content() -> None:
    row = RowId.of("data/a.jsonl", 3, b"hello")
    assert str(row) == "data/a.jsonl:3#2cf24dba5fb0"  # SHA-256 of "hello" begins so
    assert row != RowId.of("data/a.jsonl", 3, b"hello ")
    assert row == RowId.of("data/a.jsonl", 3, b"hello")


@settings(deadline=None)
@given(st.text(min_size=1).filter(lambda s: s.strip()), st.integers(0, 10**9), st.binary())
def test_parse_is_the_inverse_of_str(source: str, row: int, content: bytes) -> None:
    """Whatever the file is called: with colons, with hashes, with spaces, in Chinese."""
    row_id = RowId.of(source, row, content)
    assert RowId.parse(str(row_id)) == row_id


@pytest.mark.parametrize("text", ["", "a", "a:1", "a#b", ":1#abc", "a:1#", "a:x#abc", "a:#abc"])
def test_anything_else_is_no_row_id(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a row id|invalid literal"):
        RowId.parse(text)


def test_rows_sort_by_source_then_number() -> None:
    rows = [RowId("b", 1, "x"), RowId("a", 10, "x"), RowId("a", 9, "x")]
    assert sorted(rows) == [rows[2], rows[1], rows[0]]


@pytest.mark.parametrize("severity", Severity)
@pytest.mark.parametrize("veto", [True, False])
def test_a_finding_survives_json(severity: Severity, veto: bool) -> None:
    rows = (RowId.of("a.jsonl", 1, b"x"), RowId.of("b:c.jsonl", 2, b"y"))
    finding = Finding("NUM001", severity, "layers.0", {"loss": 1.5, "names": "a, b"}, rows, veto)
    assert Finding.from_json(json.loads(json.dumps(finding.to_json()))) == finding


def test_a_short_record_is_a_finding_too() -> None:
    found = Finding.from_json({"code": "DAT001", "severity": "note"})
    assert found == Finding("DAT001", Severity.NOTE)


def test_an_unknown_severity_is_refused() -> None:
    with pytest.raises(ValueError, match="fatal"):
        Finding.from_json({"code": "DAT001", "severity": "fatal"})


@pytest.mark.parametrize("value", [Finding("NUM001", Severity.NOTE), Reading(1, 2.0, 3.0), RowId("a", 1, "b")])
def test_values_are_frozen(value: object) -> None:
    name = dataclasses.fields(value)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, "other")


def test_a_reading_without_measurements_says_only_what_it_knows() -> None:
    record = Reading(step=1, loss=2.0, grad_norm=3.0).to_json()
    assert math.isnan(record.pop("lr"))
    assert record == {"step": 1, "loss": 2.0, "grad_norm": 3.0, "num_bad_parameters": 0}


def test_a_measured_zero_is_not_a_gap() -> None:
    record = Reading(1, 0.0, 0.0, lr=0.0, supervised_tokens=0, headroom_bits=-0.0, changed_fraction=0.0).to_json()
    for name in ("loss", "grad_norm", "lr", "supervised_tokens", "headroom_bits", "changed_fraction"):
        assert record[name] == 0


def test_a_reading_keeps_non_finite_values() -> None:
    record = Reading(1, math.nan, math.inf, amax={"a": -math.inf}).to_json()
    assert math.isnan(record["loss"])
    assert record["grad_norm"] == math.inf
    assert record["amax"] == {"a": -math.inf}


def test_the_record_does_not_share_state_with_the_reading() -> None:
    amax = {"a": 1.0}
    record = Reading(1, 1.0, 1.0, amax=amax, bad_parameters=("w",)).to_json()
    record["amax"]["a"] = 2.0
    record["bad_parameters"].append("v")
    assert amax == {"a": 1.0}


def test_a_judgement_without_findings_is_whole() -> None:
    assert Judgement(Verdict.COMMIT).findings == ()
