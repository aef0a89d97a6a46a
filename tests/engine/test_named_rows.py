"""Findings get the names and places of their rows; without rows they stay as they are."""

from __future__ import annotations

import json

from finitune.core.types import Finding, RowId, Severity
from finitune.engine.named_rows import listed, with_places, with_rows
from finitune.engine.port import Unit

ROWS = [RowId("a.jsonl", n, f"{n:012x}") for n in range(1, 6)]


def test_rows_are_named_in_the_data_and_in_the_place() -> None:
    finding = Finding("DAT100", Severity.WARNING, "", {"step": 3}, veto=True)
    told = with_rows(finding, [Unit(0, 1, (ROWS[0],)), Unit(2, 0, (ROWS[1], ROWS[2]))])
    assert told.rows == (ROWS[0], ROWS[1], ROWS[2])
    assert told.where == f"{ROWS[0]}, {ROWS[1]}, {ROWS[2]}"
    assert told.data["places"][1] == {"row": str(ROWS[1]), "micro": 2, "index": 0}
    assert (told.veto, told.data["step"]) == (True, 3)
    json.dumps(told.to_json())
    assert Finding.from_json(told.to_json()) == told


def test_a_place_that_is_known_stays_in_front_and_a_row_is_named_once() -> None:
    finding = Finding("DAT114", Severity.WARNING, "labels")
    told = with_places(finding, [(7, Unit(0, 0, (ROWS[0],))), (9, Unit(0, 3, (ROWS[0],)))])
    assert told.where == f"labels: {ROWS[0]}"
    assert told.rows == (ROWS[0],)
    assert [(p["step"], p["index"]) for p in told.data["places"]] == [(7, 0), (9, 3)]


def test_no_rows_no_change_and_many_are_counted() -> None:
    finding = Finding("DAT100", Severity.WARNING)
    assert with_rows(finding, []) is finding
    assert listed(ROWS).endswith("(+2)")
