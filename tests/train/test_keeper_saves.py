"""The keeper: what is written and when, and what a refusing disk does to a run (nothing)."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finitune.core.errors import Halted
from finitune.core.journal import Journal, read
from finitune.engine.monitor import read as read_trace
from finitune.engine.policy import Action
from finitune.numerics.digest import digest
from finitune.train import checkpoint
from finitune.train.run import open_run
from finitune.train.step import TrainPort
from support.keeping import FULL, Disk, Gate, Kept, quick_write
from support.runs import ready, tiny_recipe

SMALL = "tiny-llama:hidden=16,layers=1,heads=2,kv_heads=1,mlp=32"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "write", quick_write)


@pytest.fixture
def kept(tmp_path: Path, quick: None) -> Iterator[Callable[..., Kept]]:
    made: list[Kept] = []

    def make(**fields: Any) -> Kept:
        made.append(Kept(tmp_path, **fields))
        return made[-1]

    yield make
    for each in made:
        each.journal.abandon()


# ---------------------------------------------------------------- what is written, and when


def real_run(folder: Path, **fields: Any) -> Kept:
    """A real tiny model: its checkpoints are those of the trainer."""
    prepared = ready(folder, "data.eval_fraction=0", model=SMALL)
    run = Kept(folder, prepared.port, **fields)
    run.keeper.tokenizer = prepared.tokenizer
    return run


def bits(port: TrainPort) -> str:
    return digest(port.state_tensors(), port.state_record())


def train(port: TrainPort, count: int = 1) -> None:
    """Committed steps of the real model, without a journal."""
    for _ in range(count):
        reading = read_trace(port.forward_backward())
        port.commit(reading)
        port.settle(Action.PROCEED, reading, clean=True)


def test_what_is_written_is_the_state_at_the_time_of_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer is slow; the training goes on meanwhile."""
    gate = Gate(monkeypatch)
    run = real_run(tmp_path, background=True)
    train(run.port, 2)
    there = bits(run.port)
    run.keeper.save(2)
    train(run.port, 3)
    run.port.state.guard["later"] = True
    assert run.keeper.busy
    assert run.standing == []
    gate.open.set()
    run.keeper.settle(wait=True)
    assert not run.keeper.busy
    assert run.told == [("checkpoint-2", 2)]
    checkpoint.StoredBase(tmp_path / "checkpoint-2", 2, 2, run.port.parts).restore(run.port)
    assert bits(run.port) == there
    run.journal.close()


def test_the_next_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    run = real_run(tmp_path, background=True, limit=5)
    truth = {}
    for number in (1, 2, 3):
        train(run.port)
        truth[number] = bits(run.port)
        threading.Timer(0.05, gate.open.set).start()
        run.keeper.save(number)
    run.keeper.settle(wait=True)
    for number, there in truth.items():
        checkpoint.StoredBase(tmp_path / f"checkpoint-{number}", number, number, run.port.parts).restore(run.port)
        assert bits(run.port) == there
    assert run.keeper.stall_s > 0
    run.journal.close()


def test_without_memory_for_the_copy_saves_are_made_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = real_run(tmp_path, background=True, limit=5)
    train(run.port)
    there = bits(run.port)

    def full(*_args: Any, **_kw: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        content = run.keeper._content()
    assert all(a is b for (_, a), b in zip(run.port.state_tensors(), content.tensors.values(), strict=True))
    run.keeper.save(1)
    assert run.told == [("checkpoint-1", 1)], "written before save returned"
    train(run.port)
    checkpoint.StoredBase(tmp_path / "checkpoint-1", 1, 1, run.port.parts).restore(run.port)
    assert bits(run.port) == there
    run.journal.close()


@pytest.mark.parametrize("background", [True, False])
def test_a_state_that_is_not_finite_is_never_written_and_halts(tmp_path: Path, background: bool) -> None:
    run = real_run(tmp_path, background=background)
    train(run.port)
    run.keeper.save(1)
    run.keeper.settle(wait=True)
    train(run.port)
    with torch.no_grad():
        run.port.parts.parameters[0][1].view(-1)[0] = math.nan
    with pytest.raises(Halted, match="NUM101"):  # noqa: PT012  (in the background it comes with the next look)
        run.keeper.save(2)
        run.keeper.settle(wait=True)
    assert run.standing == [1]
    assert not [f for f in run.findings if f.code == "SYS015"], "nothing to try again"
    with pytest.raises(Halted):
        run.keeper.finish(2)
    assert run.standing == [1]
    run.journal.close()


def test_the_journal_is_on_the_disk_before_a_checkpoint_is_handed_over(
    kept: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, order = kept(), []
    real_sync, real_write = run.journal.sync, checkpoint.write
    monkeypatch.setattr(Journal, "sync", lambda _self: order.append("sync") or real_sync())
    monkeypatch.setattr(checkpoint, "write", lambda *args: order.append("write") or real_write(*args))
    run.step(2, save=True)
    assert order == ["sync", "write"] * 2


def test_where_the_journal_cannot_be_synced_nothing_is_written(
    kept: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = kept()
    with monkeypatch.context() as patch:

        def full(_self: Journal) -> None:
            raise FULL

        patch.setattr(Journal, "sync", full)
        run.step(save=True)
    assert run.standing == []
    assert [f.code for f in run.findings] == ["SYS015"]
    run.step()
    assert run.standing == [2], "tried again"


def test_a_save_is_journalled_and_told_when_it_stands(kept: Callable[..., Kept]) -> None:
    run = kept()
    run.step(2)
    run.step(save=True)
    assert [(r["step"], r["path"], r["line"]) for r in run.records("save")] == [(3, "checkpoint-3", 0)]
    assert run.told == [("checkpoint-3", 3)]
    assert run.keeper.last_saved == run.folder / "checkpoint-3"


@pytest.mark.parametrize("background", [True, False])
def test_an_error_that_is_not_the_disks_goes_up(
    kept: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    def broken(*_args: Any) -> Path:
        raise ZeroDivisionError("a fault of the program")

    monkeypatch.setattr(checkpoint, "write", broken)
    run = kept(background=background)
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        run.keeper.save(1)
        run.keeper.settle(wait=True)


# ---------------------------------------------------------------- a disk that refuses


@pytest.mark.parametrize("background", [True, False])
def test_a_failed_save_is_tried_again_at_growing_distances_until_it_stands(
    kept: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    disk, run = Disk(monkeypatch), kept(background=background)

    def steps(count: int) -> None:
        for _ in range(count):
            run.step()
            run.keeper.settle(wait=True)  # the writer is quick

    run.step(9)
    run.step(save=True)
    run.keeper.settle(wait=True)
    steps(35)
    assert disk.tries == [10, 11, 13, 17, 25, 41]
    assert [f.code for f in run.findings] == ["SYS015"] * 6
    assert [f.data["retry"] for f in run.findings] == [11, 13, 17, 25, 41, 73]
    assert all(f.data["last"] == 0 for f in run.findings)
    disk.full = False
    steps(30)
    assert disk.tries[-1] == 73
    assert run.standing == [73]
    steps(50)
    assert disk.tries[-1] == 73, "nothing is left to try"
    disk.full = True
    run.step(save=True)
    run.keeper.settle(wait=True)
    assert run.findings[-1].data["retry"] == run.port.state.step + 1, "the distance begins at one again"
    assert run.findings[-1].data["last"] == 73


def test_a_regular_save_in_between_may_succeed_as_well(
    kept: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, run = Disk(monkeypatch), kept()
    run.step(save=True)
    run.step(3)
    disk.full = False
    run.step(save=True)
    assert run.standing == [5]
    run.step(30)
    assert disk.tries[-1] == 5


def test_what_stands_is_not_touched_by_a_save_that_fails(
    kept: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, run = Disk(monkeypatch), kept(limit=1, trust_steps=2)
    disk.full = False
    run.step(save=True)
    run.step(2)
    disk.full = True
    run.step(50, every=5)
    assert run.trusted == run.standing == [1]
    assert run.keeper.last_saved == run.folder / "checkpoint-1"


def test_a_failure_at_the_very_end_is_said_and_not_tried_again(
    kept: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, run = Disk(monkeypatch), kept()
    run.step(5)
    assert run.keeper.finish(5) is False
    assert disk.tries == [5]
    assert [f.code for f in run.findings] == ["SYS001"]
    disk.full = False
    assert run.keeper.finish(5) is True
    assert run.standing == [5]


@pytest.mark.parametrize("background", [True, False])
def test_finishing_waits_and_writes_nothing_where_the_step_stands_already(
    kept: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    disk, run = Disk(monkeypatch), kept(background=background)
    disk.full = False
    run.step(4)
    run.step(save=True)
    assert run.keeper.finish(5) is True
    assert not run.keeper.busy
    assert disk.tries == [5]
    run.step()
    assert run.keeper.finish(6) is True
    assert disk.tries == [5, 6]


def test_a_save_that_failed_in_the_background_is_tried_once_more_at_the_end(
    kept: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, run = Disk(monkeypatch), kept(background=True)
    run.step(4)
    run.keeper.save(4)
    assert run.keeper.finish(4) is False
    assert disk.tries == [4, 4]
    assert [f.code for f in run.findings] == ["SYS015", "SYS001"]


# ---------------------------------------------------------------- whole runs


def codes_of(folder: Path) -> list[str]:
    return [r["code"] for r in read(folder / "run" / "journal.jsonl") if r["kind"] == "finding"]


def test_stopped_while_the_disk_is_full_says_what_is_lost_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_run(tiny_recipe(tmp_path, "max_steps=20", "save_steps=4", model=SMALL))
    disk = Disk(monkeypatch)
    disk.full = False

    class Stop:
        def on_step(self, event: Any) -> None:
            disk.full = event.reading.step > 4
            if event.reading.step == 9:
                os.kill(os.getpid(), signal.SIGINT)

    session.observers._members.append(Stop())
    result = session.run()
    assert (result.status, result.exit_code, result.steps) == ("interrupted", 0, 9)
    assert [result.findings[code] for code in ("SYS001", "SYS016")] == [1, 1]
    assert "SYS015" in result.findings
    (stopped,) = (r for r in read(tmp_path / "run" / "journal.jsonl") if r.get("code") == "SYS016")
    assert (stopped["data"]["step"], stopped["data"]["last"]) == (9, 4)
    assert sorted(p.name for p in (tmp_path / "run").glob("*checkpoint*")) == ["checkpoint-4"]


def test_finished_while_the_disk_refuses_checkpoints_ends_with_the_model_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_run(tiny_recipe(tmp_path, "max_steps=6", "save_steps=2", model=SMALL))
    Disk(monkeypatch)
    result = session.run()
    assert (result.status, result.steps) == ("finished", 6)
    assert result.final_dir is not None
    assert codes_of(tmp_path)[-1] == "SYS001"
    assert list((tmp_path / "run").glob("*checkpoint*")) == []


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_moment_that_turns_non_finite_is_mended_at_once_and_never_saved(tmp_path: Path, background: str) -> None:
    """A moment is spoilt behind the run's back, in a row of the embedding that no batch uses: no loss tells."""
    recipe = tiny_recipe(tmp_path, "max_steps=12", "save_steps=4", f"save_in_background={background}", model=SMALL)
    session = open_run(recipe)
    port = session.prepared.port

    class Spoil:
        def on_step(self, event: Any) -> None:
            if event.reading.step == 5:
                dict(port.state_tensors())["model.embed_tokens.weight|exp_avg"][1, 0] = math.nan

    session.observers._members.append(Spoil())
    result = session.run()
    assert (result.status, result.findings["NUM103"]) == ("finished", 1)
    assert all(bool(torch.isfinite(t).all()) for _, t in port.state_tensors() if t.is_floating_point())
    for folder in checkpoint.listed(tmp_path / "run"):
        assert checkpoint.faults_of(folder) == []
        assert all(bool(torch.isfinite(t).all()) for t in load_file(str(folder / "optimizer.safetensors")).values())


def test_a_checkpoint_is_written_when_the_newest_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose steps take minutes should not lose hours, whatever save_steps says."""
    now_s = [0.0]
    monkeypatch.setattr("finitune.train.keeper.time.monotonic", lambda: now_s[0])
    monkeypatch.setattr(checkpoint, "write", quick_write)
    run = Kept(tmp_path, minutes=2.0)
    run.keeper._begun_s = 0.0
    for _ in range(6):
        now_s[0] += 50.0
        run.step()
    assert run.standing == [3, 6], "after 150 s, and 150 s later"
    run.journal.close()
