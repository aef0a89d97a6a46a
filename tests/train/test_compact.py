"""The table of a journal holds its steps, one row each, and loses no number."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finitune.core.errors import UserError
from finitune.core.journal import Journal, read
from finitune.train import compact
from finitune.train.compact import to_parquet

parquet = pytest.importorskip("pyarrow.parquet")

STEP = {
    "step": 1, "loss": 2.5, "loss_scale": 65536.0, "verdict": "commit", "rows": ["a.jsonl:1#ab", "a.jsonl:2#cd"],
    "findings": [{"code": "NUM001", "severity": "error", "data": {"x": 1}}], "amax": {"layer": 1.0},
}  # fmt: skip


def journal_of(folder: Path, *records: dict[str, Any], kind: str = "step") -> Path:
    journal = Journal(folder / "journal.jsonl")
    for record in records:
        journal.write(kind, **record)
    journal.close()
    return journal.path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return parquet.read_table(path).to_pylist()


def types_of(path: Path) -> dict[str, str]:
    return {field.name: str(field.type) for field in parquet.read_schema(path)}


def test_a_step_becomes_a_row_of_plain_columns(tmp_path: Path) -> None:
    target = tmp_path / "steps.parquet"
    assert to_parquet(journal_of(tmp_path, STEP), target) == target
    (row,) = rows_of(target)
    assert row.pop("time") > 1e9
    assert row == {
        "step": 1, "loss": 2.5, "loss_scale": 65536.0, "verdict": "commit",
        "rows": ["a.jsonl:1#ab", "a.jsonl:2#cd"], "findings": ["NUM001"],
    }  # fmt: skip
    assert types_of(target) == {
        "time": "double", "step": "int64", "loss": "double", "loss_scale": "double", "verdict": "string",
        "rows": "list<element: string>", "findings": "list<element: string>",
    }  # fmt: skip


def test_only_steps_are_rows_and_the_journal_stays(tmp_path: Path) -> None:
    path = journal_of(tmp_path, STEP, STEP | {"step": 2})
    journal_of(tmp_path, {"step": 2, "loss": 9.0}, kind="eval")
    before = path.read_bytes()
    assert [row["step"] for row in rows_of(to_parquet(path, tmp_path / "t.parquet"))] == [1, 2]
    assert path.read_bytes() == before


def test_numbers_that_are_not_finite_are_numbers_again(tmp_path: Path) -> None:
    losses = [math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.5]
    path = journal_of(tmp_path, *({"loss": x, "always": math.nan, "scale": s} for s, x in enumerate(losses)))
    target = to_parquet(path, tmp_path / "t.parquet")
    assert [repr(row["loss"]) for row in rows_of(target)] == [repr(x) for x in losses]
    assert all(math.isnan(row["always"]) for row in rows_of(target))
    assert types_of(target) | {"time": "double"} == {
        "time": "double", "loss": "double", "always": "double", "scale": "int64",
    }  # fmt: skip


def test_what_was_not_measured_is_empty_and_what_is_nested_is_left_out(tmp_path: Path) -> None:
    path = journal_of(tmp_path, {"a": 1}, {"b": True, "c": [1], "d": {"x": 1}}, {"a": None, "findings": []})
    assert [{k: v for k, v in row.items() if k != "time"} for row in rows_of(to_parquet(path, tmp_path / "t"))] == [
        {"a": 1, "b": None, "findings": None},
        {"a": None, "b": True, "findings": None},
        {"a": None, "b": None, "findings": []},
    ]


def test_a_column_of_mixed_values_holds_them_as_text(tmp_path: Path) -> None:
    path = journal_of(tmp_path, {"x": 1}, {"x": "one"}, {"x": math.nan}, {"x": True}, {"x": 10**30}, {"x": "\ud800"})
    found = [row["x"] for row in rows_of(to_parquet(path, tmp_path / "t"))]
    assert found == ["1", "one", "NaN", "true", str(10**30), "\\ud800"]


def test_whole_numbers_and_fractions_make_a_column_of_floats(tmp_path: Path) -> None:
    path = journal_of(tmp_path, {"x": 1}, {"x": 0.5}, {"x": math.inf})
    assert [row["x"] for row in rows_of(to_parquet(path, tmp_path / "t"))] == [1.0, 0.5, math.inf]


def test_a_journal_without_steps_gives_an_empty_table(tmp_path: Path) -> None:
    assert rows_of(to_parquet(journal_of(tmp_path), tmp_path / "t")) == []


def test_many_rows_are_written_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "_BATCH_ROWS", 7)
    path = journal_of(tmp_path, *({"step": step} for step in range(50)))
    assert [row["step"] for row in rows_of(to_parquet(path, tmp_path / "t"))] == list(range(50))


def test_a_journal_that_grows_meanwhile_gives_the_rows_that_were_there(tmp_path: Path, monkeypatch) -> None:
    path = journal_of(tmp_path, {"step": 1}, {"step": 2})
    real, readings = compact.read, []

    def growing(journal: Path) -> Any:
        if readings:
            journal_of(tmp_path, {"step": 3, "new": "column"})
        readings.append(journal)
        return real(journal)

    monkeypatch.setattr(compact, "read", growing)
    assert [row["step"] for row in rows_of(to_parquet(path, tmp_path / "t"))] == [1, 2]
    assert len(readings) == 2


def test_damaged_lines_are_passed_over(tmp_path: Path) -> None:
    path = journal_of(tmp_path, {"step": 1}, {"step": 2}, {"step": 3})
    path.write_bytes(path.read_bytes().replace(b'"step": 2', b'"step": 9') + b'{"torn')
    assert [row["step"] for row in rows_of(to_parquet(path, tmp_path / "t"))] == [1, 3]


def test_a_disk_that_refuses_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, target = journal_of(tmp_path, {"step": 1}), tmp_path / "t.parquet"
    target.write_bytes(b"old")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        to_parquet(path, target)
    assert target.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["journal.jsonl", "t.parquet"]


def test_no_journal_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        to_parquet(tmp_path / "absent", tmp_path / "t")


def test_without_pyarrow_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="SYS043") as caught:
        to_parquet(journal_of(tmp_path, STEP), tmp_path / "t")
    assert "pip install 'finitune[parquet]'" in str(caught.value)
    assert not (tmp_path / "t").exists()


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=5)
values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(max_size=3), scalars, max_size=2)
taken = ("kind", "self", "schema", "prev", "crc")
names = st.text(st.characters(codec="utf-8"), max_size=3).filter(lambda name: name not in taken)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(st.dictionaries(names, values, max_size=4), max_size=6))
def test_any_records_make_a_table_with_a_row_each(tmp_path_factory, records: list[dict[str, Any]]) -> None:
    path = journal_of(tmp_path_factory.mktemp("any"), *records)
    rows = rows_of(to_parquet(path, path.with_name("t")))
    assert len(rows) == len(records)
    for row, record in zip(rows, read(path), strict=True):
        for name, value in record.items():
            if isinstance(value, float) and isinstance(row.get(name), float):
                assert repr(row[name]) == repr(value)
