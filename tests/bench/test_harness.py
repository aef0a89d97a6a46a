"""One case from beginning to end, and many of them in worker processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finitune.bench import pool
from finitune.bench.bench import JSON, MARKDOWN, SVG, bench
from finitune.bench.cases import Case, cases
from finitune.bench.harness import run_case
from finitune.core.registry import names

TIMES = {"time_s", "incident_s", "plain_s", "incidents"}


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    """Seconds differ from run to run, and nothing else may."""
    short = [{k: v for k, v in i.items() if k not in ("time_s", "summary")} for i in record.get("incidents", ())]
    return {k: v for k, v in record.items() if k not in TIMES} | {"incidents": short}


def test_a_case_has_the_same_record_twice() -> None:
    case = Case("faults", "nan_row", 4)
    assert without_times(run_case(case)) == without_times(run_case(case))


def test_a_case_is_found_by_name_part_and_wildcard() -> None:
    assert {c.name for c in cases([0], ["faults/nan_row/"])} == {"nan_row"}
    assert {c.key for c in cases([0, 1], ["faults/flipped_bit/1*"])} == {"faults/flipped_bit/1/finitune"}
    assert cases([0], ["no such thing"]) == []


def test_quick_cases_are_short_and_have_keys_of_their_own() -> None:
    quick = cases([0], quick=True)
    assert all(c.key.endswith("/quick") for c in quick)
    assert {c.kind for c in quick} == {"faults", "controls"}


def test_other_contenders_get_the_faults_only() -> None:
    assert {c.kind for c in cases([0], contenders=["plain"])} == {"faults"}


def test_a_bench_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    chosen, told = [Case("faults", "nan_row", 0), Case("faults", "flipped_bit", 0)], list[str]()

    def tell(done: int, count: int, record: dict[str, Any]) -> None:
        told.append(f"{done}/{count} {record['key']}")
        if len(told) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(chosen, tmp_path, 1, "x", tell)
    done = bench(chosen, tmp_path, 1, "x", tell)
    assert told == ["1/2 faults/nan_row/0/finitune", "2/2 faults/flipped_bit/0/finitune"]
    assert [r["key"] for r in done.records] == [c.key for c in chosen]
    score = json.loads((tmp_path / JSON).read_text(encoding="utf-8"))
    assert score["summary"]["poisoned_steps"] == 0
    assert "| faults noticed | 100.0 % |" in (tmp_path / MARKDOWN).read_text(encoding="utf-8")
    assert (tmp_path / SVG).read_text(encoding="utf-8").startswith("<svg")


def test_a_case_that_breaks_the_bench_is_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_case: Case) -> dict[str, Any]:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("finitune.bench.harness.run_case", broken)
    record = pool.guarded_case(Case("faults", "nan_row", 0))
    assert record["defect"] == "ZeroDivisionError: a defect"
    assert record["key"] == "faults/nan_row/0/finitune"


def test_a_case_that_takes_too_long_is_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(_case: Case) -> dict[str, Any]:
        while True:
            pass

    monkeypatch.setattr("finitune.bench.harness.run_case", endless)
    record = pool.guarded_case(Case("faults", "nan_row", 0), limit_s=1)
    assert record["defect"].startswith("TimeoutError")


def test_what_a_contender_cannot_drive_is_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from finitune.core.registry import load

    monkeypatch.setattr(load("contenders", "plain"), "missing", lambda: "not today")
    assert run_case(Case("faults", "nan_row", 0, "plain"))["skipped"] == "not today"


def test_every_family_of_the_bench_has_members() -> None:
    for family in ("faults", "controls", "runs", "contenders"):
        assert names(family)
