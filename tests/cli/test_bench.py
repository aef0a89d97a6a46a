"""``finitune bench``: lists, refusals, a run, both languages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finitune.cli.main import main
from finitune.core import registry


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def test_the_list_names_every_member(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = told(capsys, "bench", "--list")
    assert code == 0
    for family in ("faults", "controls", "runs", "contenders"):
        assert all(name in out for name in registry.names(family))


def test_one_case_is_run_and_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ("bench", "--filter", "faults/nan_row/", "--seeds", "1", "--out", str(tmp_path / "out"), "--tell")
    code, out, err = told(capsys, *words)
    assert code == 0, err
    assert "[1/1] faults/nan_row/0/finitune: noticed: yes, cause: DAT401 (right)" in err
    assert "a NaN in the input of row rows.jsonl:" in out
    assert "Incident 1 at step" in out
    assert "right cause, first named" in out
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"faultbench.json", "faultbench.md", "faultbench.svg"}


def test_json_is_one_object_with_the_summary(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ("bench", "--json", "--filter", "faults/flipped_bit/", "--seeds", "0:1", "--out", str(tmp_path))
    code, out, _ = told(capsys, *words)
    answer: dict[str, Any] = json.loads(out)
    assert code == answer["exit_code"]
    assert answer["summary"]["detection_rate"] == 1.0
    assert answer["made"]["command"] == "finitune bench --seeds 0:1 --filter 'faults/flipped_bit/'"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--seeds", "x"), "no number"),
        (("--seeds", "0"), "no number"),
        (("--seeds", "3:1"), "no number"),
        (("--seeds", "-1"), "no number"),
        (("--jobs", "0"), "less than 1"),
        (("--contender", "nobody"), "there is no contender nobody"),
        (("--filter", "no such case"), "no case matches"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(
    words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, err = told(capsys, "bench", *words, "--out", str(tmp_path / "out"))
    assert code == 2
    assert says in err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    code, _, err = told(
        capsys, "bench", "--filter", "faults/nan_row/", "--seeds", "1", "--out", str(tmp_path / "file" / "x")
    )
    assert code == 2
    assert "cannot be written" in err


def test_chinese(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ("--lang", "zh", "bench", "--filter", "faults/nan_row/", "--seeds", "1", "--out", str(tmp_path))
    code, out, err = told(capsys, *words)
    assert code == 0
    assert "发现的故障" in out
    assert "原因" in err
