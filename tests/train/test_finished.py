"""A finished run is left alone; one whose end was cut short is finished."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path

import pytest

from finitune.cli.main import main
from finitune.core.files import write_manifest
from finitune.train.finished import Finished, final_faults, finished
from finitune.train.folder import Place, find_place
from finitune.train.past import read_past, stored_recipe
from finitune.train.run import open_run, plan_run
from support.killed import content, flip, kill, resume, weights

pytestmark = pytest.mark.usefixtures("quick_plan", "open_sessions")


def test_a_finished_run_says_so_and_nothing_is_written(tmp_path, full, capsys):
    run = full.finished(tmp_path)
    before = content(run)
    told: list = []

    class Seen:
        def on_finding(self, finding) -> None:
            told.append(finding)

    opened = open_run(None, resume=str(run), observers=[Seen()])
    assert isinstance(opened, Finished)
    result = opened.run()
    assert (result.status, result.exit_code, result.final_dir) == ("finished", 0, str(run / "final"))
    assert [f.code for f in told] == ["SYS027"]
    assert plan_run(None, resume=str(run))[0] is None
    assert plan_run(None, resume=str(run / "checkpoint-8"))[0] is None
    assert main(["train", "--resume", str(run)]) == 0
    assert "max_steps=16" in capsys.readouterr().out
    assert main(["train", "--resume", str(run), "num_train_epochs=0.2", "--dry-run"]) == 0
    assert content(run) == before


@pytest.mark.parametrize("harm", ["missing", "torn", "no summary", "no last line"])
def test_a_finish_that_was_cut_short_is_finished(tmp_path, full, harm):
    run = full.finished(tmp_path)
    if harm == "missing":
        shutil.rmtree(run / "final")
    elif harm == "torn":
        path = run / "final" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    elif harm == "no summary":
        (run / "summary.json").unlink()
    else:
        lines = (run / "journal.jsonl").read_bytes().splitlines(keepends=True)
        (run / "journal.jsonl").write_bytes(b"".join(lines[:-1]))
    result = resume(run)
    assert (result.status, result.steps, weights(run)) == ("finished", 8, weights(full.whole))
    assert json.loads((run / "summary.json").read_text())["steps"] == 8
    assert resume(run).findings == {"SYS027": 1}


def test_the_result_of_a_shorter_run_is_not_taken_for_that_of_a_longer_one(tmp_path, full):
    run = full.finished(tmp_path)
    kill(open_run(stored_recipe(find_place(str(run)), ["max_steps=10"]), resume=str(run)))
    # final/ is still that of 8 steps
    assert resume(run).steps == 10


def safetensors(path: Path, length: int | None = None, tail: bytes = b"\0" * 8, **entries: object) -> None:
    header = json.dumps(entries or {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + tail)


def test_a_result_without_a_manifest_is_judged_by_its_own_headers(tmp_path):
    folder = tmp_path / "final"
    assert final_faults(folder) == ["final: no adapter_config.json or config.json"]
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert final_faults(folder) == ["final: no weights"]
    path = folder / "model.safetensors"
    safetensors(path)
    assert final_faults(folder) == []
    safetensors(path, tail=b"")
    assert "bytes, expected" in final_faults(folder)[0]
    safetensors(path, length=2**60)
    assert final_faults(folder) == ["model.safetensors: cut short"]
    path.write_bytes(b"\1")
    assert final_faults(folder) == ["model.safetensors: cut short"]
    safetensors(path, w=3)
    assert len(final_faults(folder)) == 1
    safetensors(path)
    (folder / "config.json").write_text("{")
    assert len(final_faults(folder)) == 1


def test_every_part_of_a_result_in_parts_must_be_there(tmp_path):
    folder = tmp_path / "final"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    safetensors(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    )
    assert final_faults(folder) == ["model-2.safetensors: missing"]
    (folder / "model.safetensors.index.json").write_text("[]")
    assert len(final_faults(folder)) == 1


def test_the_manifest_of_a_result_is_asked_where_it_has_one(tmp_path):
    folder = tmp_path / "final"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    safetensors(folder / "model.safetensors")
    write_manifest(folder, {})
    assert final_faults(folder) == []
    flip(folder / "model.safetensors")
    assert len(final_faults(folder)) == 1


def end(run: Path) -> dict:
    return dict(read_past(run).end)


@pytest.mark.parametrize("harm", [{"status": "interrupted"}, {"steps": "8"}, {"steps": 7}, {"updates": ...}])
def test_a_last_line_that_is_not_that_of_a_finished_run_leaves_something_to_do(full, harm):
    place, past = Place(full.whole), read_past(full.whole)
    assert finished(place, past, 8, ()) is not None
    past.end = {k: v for k, v in (end(full.whole) | harm).items() if v is not ...}
    assert finished(place, past, 8, ()) is None


def test_the_result_of_a_finished_run_is_that_of_its_last_line(tmp_path, full):
    past = read_past(full.whole)
    past.end = end(full.whole) | {"train_loss": "NaN", "run_dir": "/elsewhere", "final_dir": "/elsewhere/final"}
    result = finished(Place(full.whole), past, 8, ()).run()
    assert math.isnan(result.train_loss)
    assert (result.run_dir, result.final_dir) == (str(full.whole), str(full.whole / "final"))
    assert (result.steps, result.updates) == (8, 8)
    assert finished(Place(full.whole), past, 9, ()) is None
    assert finished(Place(full.whole), past, -1, ()) is None
    assert finished(Place(full.whole, full.whole / "checkpoint-6"), past, 8, ()) is None
    assert finished(Place(full.whole, tmp_path / "gone"), past, 8, ()) is None
