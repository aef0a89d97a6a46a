"""The harness can fail: it sees one changed bit, one missing record, one torn file, one silent loss."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kill import damage, plans
from kill.damage import Damage
from kill.faults import SHORT, Fault, Refusals
from kill.oracle import Truth, checkpoints, differences, faults_of, leftovers, unreadable
from kill.points import Place, Points, Unflushed, plain_name
from kill.trials import Trial, run_trial

if TYPE_CHECKING:
    from kill.bench import Bench
    from kill.client import Pool
    from kill.conftest import Benches


@pytest.fixture
def bench(benches: Benches) -> Bench:
    return benches.of(["full fp32"])[0]


@pytest.fixture
def finished(bench: Bench, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(bench.home / "watched" / "run", tmp_path / "run")


def _change_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_an_untouched_copy_is_the_same(bench: Bench, finished: Path) -> None:
    assert differences(bench.truth, finished) == []
    assert unreadable(finished) == []


@pytest.mark.parametrize(
    "name",
    [
        "final/model.safetensors",
        "final/tokenizer.json",
        "checkpoint-12/optimizer.safetensors",
        "checkpoint-12/state.json",
    ],
)
def test_one_changed_bit_is_seen(bench: Bench, finished: Path, name: str) -> None:
    _change_last_byte(finished / name)
    assert len(differences(bench.truth, finished)) == 1


def test_a_missing_step_and_a_summary_that_differs_are_seen(bench: Bench, finished: Path) -> None:
    path = finished / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    step = next(n for n, line in enumerate(lines) if b'"kind": "step"' in line)
    path.write_bytes(b"".join(lines[:step] + lines[step + 1 :]))
    assert [d for d in differences(bench.truth, finished) if d.startswith("step (1, None): missing")]
    summary = finished / "summary.json"
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "updates": 11}))
    assert "total updates: is 11, should be 12" in differences(bench.truth, finished)


def test_a_loss_that_differs_in_its_last_bit_is_seen(bench: Bench, finished: Path) -> None:
    key = next(iter(bench.truth.steps))
    nearly = {**bench.truth.steps[key], "loss": bench.truth.steps[key]["loss"] * (1 + 2**-52)}
    truth = dataclasses.replace(bench.truth, steps={**bench.truth.steps, key: nearly})
    assert differences(truth, finished)


def test_a_torn_checkpoint_and_a_half_written_one_are_seen(finished: Path) -> None:
    newest = checkpoints(finished)[-1]
    os.truncate(newest / "model.safetensors", 100)
    assert faults_of(newest) == ["model.safetensors differs from the manifest"]
    (newest / "manifest.json").unlink()
    assert unreadable(finished)[0].startswith("checkpoint-12: no manifest")
    (finished / ".checkpoint-15.1-0123abcd.tmp").mkdir()
    assert leftovers(finished) == [".checkpoint-15.1-0123abcd.tmp"]


def test_a_trial_that_comes_out_wrong_says_how_to_repeat_it(bench: Bench, pool: Pool, tmp_path: Path) -> None:
    wrong = dataclasses.replace(bench, truth=dataclasses.replace(bench.truth, final={"model.safetensors": "other"}))
    trial = Trial(bench.configuration, plans.KIND_PLACE, ("at step after update#3",))
    outcome = run_trial(pool.servers[0], trial, wrong, tmp_path / "trial")
    assert outcome.replies[0]["died"]
    assert any("final model.safetensors" in fault for fault in outcome.faults)
    text = outcome.report()
    assert "FINITUNE_KILL_TRIAL=" in text
    line = next(line for line in text.splitlines() if "FINITUNE_KILL_TRIAL=" in line)
    assert Trial.parse(line[line.index("{") : line.rindex("}") + 1]) == trial


@pytest.mark.parametrize(
    "text",
    ["step before commit#12", "write journal.jsonl:step#3/half", "rename .a.*-*.tmp to a#1/cut", "fsync .#2/int"],
)
def test_a_place_survives_being_written_down(text: str) -> None:
    assert str(Place.parse(text)) == text


def test_names_of_places_hold_nothing_random(tmp_path: Path) -> None:
    path = tmp_path / f".checkpoint-12.{os.getpid()}-0a1b2c3d.tmp" / "state.json"
    assert plain_name(path, tmp_path) == ".checkpoint-12.*-*.tmp/state.json"
    assert plain_name(tmp_path, tmp_path) == "."


def test_a_power_cut_takes_only_what_was_not_flushed(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"x" * 100)
    unflushed = Unflushed(tmp_path)
    for name in ("flushed", "partly", "never"):
        (tmp_path / name).write_bytes(b"x" * 100)
    for name in ("flushed", "partly"):
        with (tmp_path / name).open("rb") as handle:
            unflushed.flushed(handle.fileno())
    with (tmp_path / "partly").open("ab") as handle:
        handle.write(b"y" * 100)
    unflushed.lose(random.Random(1))
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert (sizes["old"], sizes["flushed"]) == (100, 100)
    assert 100 <= sizes["partly"] < 200
    assert sizes["never"] < 100


def test_faults_strike_when_they_should(tmp_path: Path) -> None:
    fault = Fault(("write",), "ENOSPC", match="^journal", first=2, count=2)
    refusals = Refusals([fault, Fault(("write",), SHORT, count=None)])
    points = Points(tmp_path, refusals=refusals)
    points.reach("write", "journal.jsonl")
    points.reach("write", "other")
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            points.reach("write", "journal.jsonl")
    points.reach("write", "journal.jsonl")
    assert (fault.hits, refusals.shortened("x", 10)) == (2, 5)
    assert points.seen[-1] == "write journal.jsonl#4"


def test_every_damage_changes_something(bench: Bench, pool: Pool, tmp_path: Path) -> None:
    template = bench.template(pool.servers[0], "late") / "run"
    found = damage.all_damages(template, range(1))
    kinds = {what.kind: what for what in found}
    for number, what in enumerate([*kinds.values(), Damage("swap", "optimizer.safetensors")]):
        run = shutil.copytree(template, tmp_path / str(number) / "run")
        before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
        damage.apply(what, run)
        after = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
        assert (before != after) == damage.changes(what, template), what


def test_a_pickle_that_is_executed_is_noticed(bench: Bench, pool: Pool, tmp_path: Path) -> None:
    run = shutil.copytree(bench.template(pool.servers[0], "late") / "run", tmp_path / "run")
    damage.apply(Damage("add", "data.pkl"), run)
    assert not damage.was_unpickled(run)
    pickle.loads((run / "checkpoint-9" / "data.pkl").read_bytes())
    assert damage.was_unpickled(run)


def test_the_truth_of_a_run_holds_every_step(bench: Bench) -> None:
    truth = Truth.of(bench.home / "watched" / "run")
    assert [key[0] for key in truth.steps] == list(range(1, 13))
    assert truth.marks
    assert truth.checkpoint.keys() == {"model.safetensors", "optimizer.safetensors", "state.json"}
