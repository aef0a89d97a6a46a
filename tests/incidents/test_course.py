"""Faults of the course: a learning rate that is too high (I)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from incidents import planted
from support.incidents import PORTS, Rig, named, summary, tell


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_rate_hundred_times_too_high_is_named_and_lowered(tmp_path: Path, port: str, seed: int) -> None:
    # At a rate of which 1e4 times is no more than this, a tiny model learns nothing that could be spoilt.
    story = tell(port, tmp_path, planted.high_rate(20 + 3 * seed, 100.0), "learning_rate=3e-3", steps=34, lr=3e-3)
    found = story.first
    assert found.diagnosis.code == "OPT401", [summary(i) for i in story.incidents]
    assert found.remedy == "lower_lr", summary(found)
    assert not story.poisoned


@pytest.mark.parametrize("port", PORTS)
def test_a_run_away_under_plain_descent_is_named_and_the_rate_lowered(tmp_path: Path, port: str) -> None:
    def nothing(_rig: Rig) -> None:
        """The rate of the recipe is the fault (recipe B)."""

    more = ("optim=sgd", "learning_rate=2.0", "max_grad_norm=null")
    story = tell(
        port,
        tmp_path,
        nothing,
        *more,
        steps=28,
        optimizer=lambda m: torch.optim.SGD(m.parameters(), 2.0, momentum=0.9),
        max_grad_norm=None,
    )
    told = [summary(i) for i in story.incidents]
    assert {c for i in story.incidents for c in named(i)} == {"OPT401"}, told
    assert "lower_lr" in [i.remedy for i in story.incidents], told
    assert not story.poisoned
    assert not story.stopped
    assert story.losses[28] < 5.8, story.losses
