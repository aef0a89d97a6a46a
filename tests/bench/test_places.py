"""What a finding or an error of ours points at is read as the user reads it: its place, its rows, its parameters."""

from __future__ import annotations

from finitune.bench.contenders.finitune import places_of
from finitune.core.errors import UserError
from finitune.core.types import RowId
from finitune.engine.codes_half import HALF_UNDER_SCALER
from finitune.engine.tables.codes import BEYOND_TABLE


def test_rows_and_parameters_are_read_with_the_place() -> None:
    row = RowId("a.jsonl", 3, "0123456789ab")
    error = UserError(BEYOND_TABLE, "input_ids[1, 2]", rows=(row,), micro=0)
    assert list(places_of(error.finding())) == [("finding", "input_ids[1, 2]"), ("row", str(row))]
    found = HALF_UNDER_SCALER.find("a.weight", parameters=["a.weight", "b.weight"])
    kinds = [kind for kind, _ in places_of(found)]
    assert kinds == ["finding", "parameter", "parameter"]


def test_a_finding_without_a_place_points_at_nothing() -> None:
    assert list(places_of(HALF_UNDER_SCALER.find())) == []
