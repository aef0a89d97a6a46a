"""The keeper when a run goes back, or is taken up again."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finitune.train import checkpoint
from finitune.train.keeper import free_name, step_in
from support.keeping import Gate, Kept, quick_write


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


def test_after_going_back_later_checkpoints_are_put_aside_until_a_newer_one_is_trusted(
    kept: Callable[..., Kept],
) -> None:
    run = kept(limit=9, trust_steps=6)
    run.step(12, every=3)
    assert run.trusted == [3, 6]
    run.keeper.abandon_after(5)
    assert run.standing == run.trusted == [3]
    assert run.abandoned == ["abandoned-1-checkpoint-12", "abandoned-1-checkpoint-6", "abandoned-1-checkpoint-9"]
    assert run.keeper.last_saved == run.folder / "checkpoint-3"
    run.port.state.step, run.port.state.clean_steps = 5, 5
    run.step(6, every=4)
    assert run.standing == [3, 8]
    assert len(run.abandoned) == 3
    run.step(3)
    assert run.trusted == [3, 8]
    assert run.abandoned == []
    assert [r["line"] for r in run.records("save")] == [0, 0, 0, 0, 1]


def test_a_checkpoint_of_the_very_step_stays(kept: Callable[..., Kept]) -> None:
    run = kept(limit=9)
    run.step(6, every=3)
    run.keeper.abandon_after(3)
    assert run.standing == [3]
    assert run.keeper.last_saved == run.folder / "checkpoint-3"


def test_going_back_to_the_start_leaves_none(kept: Callable[..., Kept]) -> None:
    run = kept(limit=9)
    run.step(4, save=True)
    run.keeper.abandon_after(0)
    assert run.standing == []
    assert run.keeper.last_saved is None
    run.port.state.step = 0
    assert run.keeper.finish(0) is True


def test_a_candidate_that_was_put_aside_is_never_trusted(kept: Callable[..., Kept]) -> None:
    run = kept(limit=9, trust_steps=3)
    run.step(5, save=True)
    run.keeper.abandon_after(1)
    run.port.state.step, run.port.state.clean_steps = 1, 1
    run.step(20)
    assert run.trusted == [1]
    assert not run.findings


def test_going_back_twice_to_the_same_place_keeps_both_lines_apart(kept: Callable[..., Kept]) -> None:
    run = kept(limit=9, trust_steps=100)
    for _ in range(2):
        run.step(3, save=True)
        run.keeper.abandon_after(1)
        run.port.state.step = 1
    assert run.standing == [1]
    assert run.abandoned == [
        "abandoned-1-checkpoint-2",
        "abandoned-1-checkpoint-3",
        "abandoned-2-checkpoint-2",
        "abandoned-2-checkpoint-3",
        "abandoned-2-checkpoint-4",
    ]


def test_what_is_being_written_while_the_run_goes_back_is_put_aside_too(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    run = Kept(tmp_path, background=True)
    run.port.state.step = 7
    run.keeper.save(7)
    threading.Timer(0.05, gate.open.set).start()
    run.keeper.abandon_after(5)
    assert run.standing == []
    assert run.abandoned == ["abandoned-1-checkpoint-7"]
    run.journal.close()


def test_an_earlier_session_is_recalled(kept: Callable[..., Kept]) -> None:
    """The line, the best and the candidates; what stands beyond the point that the run goes on from is put aside."""
    run = kept(limit=9, trust_steps=4)
    run.journal.write("rollback", from_step=9, to_step=0, attempt=0, reason="a test", base=0)
    for number, loss in ((2, 3.0), (4, 1.5), (6, math.nan)):
        run.journal.write("eval", step=number, loss=loss, supervised_tokens=5, rows=2)
    run.step(8, every=2)
    again = run.make(run.folder / "checkpoint-6", limit=9, trust_steps=4)
    again.recall()
    assert (again.line, again.best) == (1, (1.5, 4))
    assert run.standing == [2, 4, 6]
    assert run.abandoned == ["abandoned-1-checkpoint-8"]
    assert [step_in(p) for p in again._candidates] == [6]


def test_an_earlier_session_that_went_back_is_recalled_without_what_it_left(kept: Callable[..., Kept]) -> None:
    run = kept(limit=9)
    for number, loss in ((2, 3.0), (4, 0.1)):
        run.journal.write("eval", step=number, loss=loss, supervised_tokens=5, rows=2)
    run.journal.write("rollback", from_step=4, to_step=3, attempt=3, reason="a test", base=0)
    run.journal.write("eval", step=4, loss=2.0, supervised_tokens=5, rows=2)
    run.step(4, every=2)
    again = run.make(run.folder / "checkpoint-4", limit=9)
    again.recall()
    assert again.best == (2.0, 4)


def test_damaged_evaluations_in_the_journal_raise_nothing(kept: Callable[..., Kept]) -> None:
    run = kept()
    for record in ({}, {"step": 2}, {"step": None, "loss": 1.0}, {"step": 3, "loss": "x"}, {"step": 3, "loss": []}):
        run.journal.write("eval", **record)
    run.journal.write("eval", step=4, loss=2.0)
    run.keeper.recall()
    assert run.keeper.best == (2.0, 4)


def test_a_free_name_is_numbered_where_something_stands(tmp_path: Path) -> None:
    assert free_name(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").mkdir()
    (tmp_path / "a-2").write_text("")
    assert free_name(tmp_path / "a") == tmp_path / "a-3"
