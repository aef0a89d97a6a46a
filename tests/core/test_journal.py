"""The journal hides nothing and survives a torn end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finitune.core.journal import SCHEMA, Journal, encode, number, read


def test_records_come_back_in_order_with_schema_and_kind(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run" / "journal.jsonl")
    journal.write("step", step=1, loss=2.5)
    journal.write("end")
    journal.close()
    first, last = read(journal.path)
    assert (first["kind"], first["step"], first["loss"], first["schema"]) == ("step", 1, 2.5, SCHEMA)
    assert last["kind"] == "end"


def test_non_finite_numbers_are_spelled_out_and_every_line_is_strict_json(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.write("step", loss=math.nan, nested={"norms": [math.inf, -math.inf, -0.0]})
    journal.close()

    def refuse(token: str) -> None:
        raise AssertionError(f"bare {token}")

    line = json.loads(journal.path.read_text(), parse_constant=refuse)
    assert line["loss"] == "NaN"
    assert line["nested"]["norms"][:2] == ["Infinity", "-Infinity"]
    assert math.copysign(1, line["nested"]["norms"][2]) == -1


@given(st.floats())
def test_number_reads_back_what_encode_wrote(value: float) -> None:
    back = number(json.loads(json.dumps(encode(value))))
    assert back == value or (math.isnan(back) and math.isnan(value))


@given(st.integers(min_value=0))
def test_a_journal_torn_anywhere_gives_every_whole_line_before(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("torn") / "j"
    journal = Journal(path)
    for step in range(5):
        journal.write("step", step=step)
    journal.close()
    whole = path.read_bytes()
    kept = cut % (len(whole) + 1)
    path.write_bytes(whole[:kept])
    steps = [r["step"] for r in read(path)]
    assert steps == list(range(len(steps)))
    assert len(steps) >= whole[:kept].count(b"\n")


def test_writing_after_a_torn_end_starts_on_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_text('{"schema": 1, "kind": "step", "step": 1}\n{"schema": 1, "ki')
    journal = Journal(path)
    journal.write("resume", step=1)
    journal.close()
    assert [r["kind"] for r in read(path)] == ["step", "resume"]
