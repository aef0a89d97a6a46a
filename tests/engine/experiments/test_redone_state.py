"""The steps before a failure, computed again, tell a state that was changed from outside from one that the run made."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from engine.experiments.port import HalfPort, causal_loss, llama, text
from engine.experiments.test_single import made, trained
from finitune.core.incident import Result, Trigger
from finitune.engine.experiments import redone_state
from finitune.engine.lab import Lab
from finitune.engine.monitor import read
from finitune.engine.snapshot import as_snapshot

WEIGHT = "model.layers.0.mlp.up_proj.weight"


def changed(name: str, index: tuple[int, ...], value: float, *, steps: int = 8) -> Lab:
    """A sound run, whose present state is changed in one place."""
    lab = trained(steps, Trigger.GRADIENT)
    tensors = dict(lab.port.state_tensors())
    with torch.no_grad():
        tensors[name][index] = value
    reading = read(lab.port.forward_backward())
    lab.port.abort()
    lab.case = replace(lab.case, reading=replace(reading, grad_norm=math.inf))
    lab.before = as_snapshot(lab.port)
    return lab


def fails(lab: Lab, monkeypatch: pytest.MonkeyPatch, limit: float) -> None:
    """A step counts as bad above a loss."""
    monkeypatch.setattr(type(lab.case), "is_bad", lambda _case, reading: not reading.loss <= limit)


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [("lm_head.weight", (40, 2), -1e5), ("model.norm.weight", (7,), -2e4), ("lm_head.weight", (9, 1), 3e5)],
)
def test_the_place_the_old_and_the_new_value_are_told(
    name: str, index: tuple[int, ...], value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = changed(name, index, value)
    fails(lab, monkeypatch, limit=lab.case.past["median_loss"] + 0.5)
    lab.before.restore(lab.port)
    assert lab.shoot().bad, "the change shows in the loss"
    should = float(lab.state_at(8).tensors[name][index]) if lab.state_at(8) is not lab.before else None
    found, suspects = made(lab, "redone_state")
    assert found.result is Result.GOOD
    assert found.numbers["num_tensors"] == 1
    assert (suspects[0].name, suspects[0].data["index"], suspects[0].data["num_bad"]) == (name, list(index), 1)
    assert suspects[0].data["value"] == pytest.approx(value)
    assert abs(suspects[0].data["was"]) < 2
    assert should is None or suspects[0].data["was"] == should
    assert "{" not in redone_state.SAYS[Result.GOOD].say(found.numbers)


def test_a_state_that_the_run_made_is_the_same_again_and_nothing_is_accused() -> None:
    lab = trained(8, Trigger.GRADIENT)
    found, suspects = made(lab, "redone_state")
    assert (found.result, found.numbers["num_tensors"], suspects) == (Result.BAD, 0, ())
    assert found.numbers["num_steps"] == 3
    assert "{" not in redone_state.SAYS[Result.BAD].say(found.numbers)


def test_a_change_that_does_not_explain_the_failure_accuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = changed(WEIGHT, (3, 5), 0.5)
    fails(lab, monkeypatch, limit=0.0)  # it fails on the right state too
    found, suspects = made(lab, "redone_state")
    assert (found.result, found.numbers["num_tensors"], suspects) == (Result.BAD, 1, ())


def test_an_earlier_state_is_taken_where_the_redo_of_the_newest_ones_came_to_other_numbers() -> None:
    lab = trained(8, Trigger.GRADIENT)
    real = lab.state_at
    lab.state_at = lambda step: None if step > 2 else real(step)  # type: ignore[method-assign]
    assert made(lab, "redone_state")[0].numbers["start_step"] == 2


def test_skipped_batches_in_between_cannot_be_walked() -> None:
    lab = trained(8, Trigger.GRADIENT)
    lab.before.record["updates"] = lab.before.record.get("updates", 8) - 1
    found, _ = made(lab, "redone_state")
    assert found.result is Result.NOT_RUN


def test_without_a_state_of_before_it_says_so() -> None:
    model = llama(layers=1)
    port = HalfPort(model, torch.optim.SGD(model.parameters(), lr=0.1), causal_loss, text(4))
    assert made(trained(0, Trigger.GRADIENT, port=port), "redone_state")[0].result is Result.NOT_RUN
