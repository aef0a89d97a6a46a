"""The comparison of resumes judges its runs rightly: torn folders, single bits, rows, steps done again."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("resource", reason="the script needs POSIX processes")

import resume_damage
import resume_exact
import resume_faults
from resume_faults import Reference
from resume_runs import Story
from resume_sides import Job


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    save_file({"w": torch.linspace(1, 2, 64)}, str(folder / "model.safetensors"))
    torch.save({"m": torch.linspace(1, 2, 64)}, folder / "optimizer.pt")
    (folder / "state.json").write_text(json.dumps({"step": 4}))
    return folder


def told(first: int, last: int, rows: dict[int, list[int]] | None = None, finished: bool = True) -> Story:
    steps = [{"step": s, "loss": float(s).hex(), "rows": (rows or {}).get(s, [s])} for s in range(first, last + 1)]
    return Story("exit 0", Path("-"), steps, [{"event": "end", "status": "finished"}] if finished else [])


def test_a_whole_checkpoint_is_not_torn_and_files_that_come_later_do_not_count(checkpoint: Path) -> None:
    expected = resume_faults.files_of(checkpoint)
    (checkpoint / "trusted.json").write_text("{}")
    assert resume_faults.torn(checkpoint, expected) is None
    assert resume_faults.files_of(checkpoint) == expected


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("hurt", [Path.unlink, resume_damage.halve])
def test_a_missing_or_cut_file_is_torn(checkpoint: Path, name: str, hurt) -> None:
    expected = resume_faults.files_of(checkpoint)
    hurt(checkpoint / name)
    assert resume_faults.torn(checkpoint, expected) is not None


def test_a_folder_that_is_not_there_is_torn(tmp_path: Path) -> None:
    assert resume_faults.torn(tmp_path / "none", {"state.json"}) is not None


def test_a_flipped_bit_changes_one_weight_by_at_most_half_and_leaves_the_file_readable(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    before = load_file(str(path))["w"].clone()
    resume_damage.flip_bit(path)
    after = load_file(str(path))["w"]
    changed = (before != after).nonzero().flatten()
    assert len(changed) == 1
    assert after[changed].item() == pytest.approx(before[changed].item(), rel=0.5)
    assert resume_faults.torn(checkpoint, resume_faults.files_of(checkpoint)) is None


def test_final_weights_are_compared_by_bits(tmp_path: Path) -> None:
    values = {"one": 0.0, "other": 0.0, "minus": -0.0}
    for name, value in values.items():
        (tmp_path / name / "final").mkdir(parents=True)
        save_file({"w": torch.tensor([value])}, str(tmp_path / name / "final" / "model.safetensors"))
    assert resume_faults.same_weights(tmp_path / "one", tmp_path / "other")
    assert not resume_faults.same_weights(tmp_path / "one", tmp_path / "minus")
    shutil.rmtree(tmp_path / "other" / "final")
    assert not resume_faults.same_weights(tmp_path / "one", tmp_path / "other")


def test_rows_are_counted_on_the_line_that_led_to_the_end() -> None:
    expected = Counter(dict.fromkeys(range(1, 7), 1))
    assert resume_exact.visits(told(1, 5), told(4, 6), expected) == (0, 0)
    assert resume_exact.visits(told(1, 5), told(4, 6, {5: [1]}), expected) == (1, 1)


def test_losses_that_differ_in_the_last_bit_are_not_equal(tmp_path: Path) -> None:
    truth = Reference(Job(tmp_path), tmp_path / "truth", told(1, 6))
    resumed = told(4, 6)
    assert resume_exact.compared(truth, told(1, 5), resumed, tmp_path)["losses equal"] == "3 of 3"
    resumed.steps[1]["loss"] = (5.0 + 2.0**-50).hex()
    row = resume_exact.compared(truth, told(1, 5), resumed, tmp_path)
    assert (row["losses equal"], row["first differing step"]) == ("2 of 3", 5)
    assert row["largest difference"] == 2.0**-50


def test_a_resume_that_finds_the_run_complete_costs_nothing_and_one_that_fails_costs_all() -> None:
    assert resume_faults.done_again(told(1, 5), told(4, 6)) == 2
    assert resume_faults.done_again(told(1, 6), told(1, 0)) == 0
    assert resume_faults.done_again(told(1, 5), told(1, 0, finished=False)) == 5


def test_errors_are_shown_without_folders_and_table_borders(tmp_path: Path) -> None:
    shown = resume_faults.plain(f"no such file: {tmp_path}/checkpoint-8 | at 0x7f00\n" + "x" * 300, tmp_path)
    assert shown.startswith("no such file: RUN/checkpoint-8 / at 0x.. ")
    assert len(shown) <= 160
