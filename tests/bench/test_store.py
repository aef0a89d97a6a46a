"""Records on disk: a stopped bench goes on, and old sources count for nothing."""

from __future__ import annotations

from pathlib import Path

from finitune.bench.store import FILE, Store, read_records, sources_digest


def test_a_record_is_there_after_a_restart(tmp_path: Path) -> None:
    Store(tmp_path, "s1").add({"key": "a", "loss": float("nan"), "place": (1, 2)})
    again = Store(tmp_path, "s1")
    assert "a" in again
    assert again.of(["b", "a"]) == [{"key": "a", "loss": "NaN", "place": [1, 2], "sources": "s1"}]


def test_other_sources_count_for_nothing(tmp_path: Path) -> None:
    Store(tmp_path, "s1").add({"key": "a"})
    assert "a" not in Store(tmp_path, "s2")


def test_a_torn_line_costs_one_record(tmp_path: Path) -> None:
    store = Store(tmp_path, "s")
    store.add({"key": "a"})
    store.add({"key": "b"})
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-9])
    assert [r["key"] for r in read_records(path)] == ["a"]


def test_foreign_lines_are_left_out(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('[1]\n{"key": 3}\n\n{"key": "a"}\nno json\n', encoding="utf-8")
    assert [r["key"] for r in read_records(tmp_path / FILE)] == ["a"]
    assert read_records(tmp_path / "nothing") == []


def test_a_later_record_of_a_case_replaces_the_earlier(tmp_path: Path) -> None:
    store = Store(tmp_path, "s")
    store.add({"key": "a", "n": 1})
    store.add({"key": "a", "n": 2})
    assert Store(tmp_path, "s").of(["a"])[0]["n"] == 2


def test_the_digest_of_the_sources_is_stable() -> None:
    assert sources_digest() == sources_digest()
    assert len(sources_digest()) == 12
