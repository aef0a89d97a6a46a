"""Faults of the data and of the loss: nothing supervised (A), poles (K), broken rows (N)."""

from __future__ import annotations

from pathlib import Path

import pytest

from finitune.engine.policy import Action
from incidents import planted
from support.incidents import PORTS, Story, shows, summary, suspects, tell

PRECISION = ("NUM400", "NUM401", "NUM402", "NUM403", "OPT400")
WEIGHTS = ("MOD400", "MOD402", "SYS403")
RATE = ("OPT401", "OPT406")


def row_of(story: Story, step: int, row: int) -> str:
    return story.rig.name(step, row)


@pytest.mark.parametrize("port", PORTS)
def test_a_step_without_a_label_is_left_out_and_nothing_is_treated(tmp_path: Path, port: str) -> None:
    story = tell(port, tmp_path, planted.no_label(5))
    assert dict(story.actions)[5] is Action.SKIP_BATCH
    assert [a for s, a in story.actions if s != 5] == [Action.PROCEED] * 9
    assert "DAT100" in story.codes
    assert not [c for c in story.codes if c.startswith(("NUM", "OPT"))]
    assert story.incidents == []
    assert not story.poisoned


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize(("kind", "seed"), [("sqrt", 0), ("sqrt", 1), ("exp", 0), ("log", 0)])
def test_a_pole_of_the_loss_is_named_with_its_row(tmp_path: Path, port: str, kind: str, seed: int) -> None:
    [(step, row)] = planted.places(seed)
    story = tell(port, tmp_path, planted.pole(step, row, kind))
    found = shows(story, "NUM404", remedies=("skip_rows",), never=(*PRECISION, *WEIGHTS, *RATE))
    assert found.step == step, summary(found)
    assert any(row_of(story, step, row) in r for r in suspects(found, "row")), summary(found)
    assert not story.stopped


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_row_with_a_nan_input_is_named_and_quarantined(tmp_path: Path, port: str, seed: int) -> None:
    [(step, row)] = planted.places(seed)
    story = tell(port, tmp_path, planted.nan_inputs((step, row)))
    found = shows(story, "DAT401", remedies=("skip_rows",), never=(*PRECISION, *WEIGHTS, *RATE))
    assert found.step == step, summary(found)
    assert [row_of(story, step, row) in r for r in dict.fromkeys(suspects(found, "row"))] == [True], summary(found)
    assert len(story.incidents) == 1


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_row_with_an_infinite_weight_is_named_and_quarantined(tmp_path: Path, port: str, seed: int) -> None:
    [(step, row)] = planted.places(seed)
    story = tell(port, tmp_path, planted.inf_weight(step, row))
    found = shows(story, "DAT401", remedies=("skip_rows",), never=(*PRECISION, *WEIGHTS, *RATE))
    assert found.step == step, summary(found)
    assert any(row_of(story, step, row) in r for r in suspects(found, "row")), summary(found)


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_two_broken_rows_of_one_batch_are_both_found(tmp_path: Path, port: str, seed: int) -> None:
    both = planted.places(seed, 2)
    story = tell(port, tmp_path, planted.nan_inputs(*both))
    found = shows(story, "DAT401", remedies=("skip_rows",), never=(*PRECISION, *WEIGHTS, *RATE))
    told = set(suspects(found, "row"))
    assert len(told) == 2, summary(found)
    for step, row in both:
        assert any(row_of(story, step, row) in r for r in told), summary(found)
    assert len(story.incidents) == 1
