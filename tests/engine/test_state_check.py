"""What is looked at after an update: weights always, moments when it is due or when somebody wrote into them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from finitune.engine import state_check
from finitune.engine.state_check import StateCheck


class _State:
    updates = 2


class _Port:
    """A weight and two moments, and a running statistic."""

    def __init__(self) -> None:
        self.state = _State()
        self.weight = torch.nn.Parameter(torch.ones(4, 3))
        self.held = {"w|exp_avg": torch.zeros(4, 3), "w|exp_avg_sq": torch.zeros(4, 3), "mean": torch.zeros(3)}

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [("w", self.weight)]

    def state_tensors(self) -> list[tuple[str, Any]]:
        return [("w", self.weight), *self.held.items()]


@pytest.fixture(autouse=True)
def _nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_check, "SMALL_BYTES", 0)


def _checked(port: _Port, every_updates: int = 10) -> StateCheck:
    check = StateCheck(port, every_updates)  # type: ignore[arg-type]
    check.end(ordinary=True)
    return check


def _one_step(check: StateCheck, tokens: int = 8) -> list[str]:
    check.begin()
    found = check.spoilt(tokens)
    check.end(ordinary=not found)
    return found


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("name", ["w|exp_avg", "w|exp_avg_sq", "mean"])
def test_what_somebody_wrote_between_two_steps_is_looked_at_in_the_next(name: str, value: float) -> None:
    port = _Port()
    check = _checked(port)
    assert not _one_step(check)
    port.held[name].view(-1)[2] = value
    check.begin()
    assert check.written == [name]
    assert check.spoilt(8) == [name]


@pytest.mark.parametrize("value", [-0.0, 1e-45, 3.0])
def test_a_harmless_write_is_no_fault(value: float) -> None:
    port = _Port()
    check = _checked(port)
    port.held["w|exp_avg"][0, 0] = value
    assert not _one_step(check)
    check.begin()
    assert check.written == []


def test_what_torch_does_not_count_waits_for_the_whole_look() -> None:
    port = _Port()
    check = _checked(port)
    port.held["w|exp_avg_sq"].data[0, 0] = math.inf
    assert not _one_step(check)
    port.state.updates = 10
    assert _one_step(check) == ["w|exp_avg_sq"]


def test_a_weight_is_looked_at_in_every_step() -> None:
    port = _Port()
    check = _checked(port)
    port.weight.data[0, 0] = math.nan
    assert _one_step(check) == ["w"]


def test_large_steps_are_looked_at_whole() -> None:
    port = _Port()
    check = _checked(port)
    port.held["w|exp_avg_sq"].data[0, 0] = math.inf
    assert not _one_step(check, tokens=2000)
    assert _one_step(check, tokens=2100) == ["w|exp_avg_sq"], "4096 tokens since the last whole look"


def test_the_update_of_the_optimizer_is_not_somebody_else() -> None:
    port = _Port()
    check = _checked(port)
    check.begin()
    port.held["w|exp_avg"].add_(1.0)
    assert not check.spoilt(8)
    check.end(ordinary=True)
    check.begin()
    assert check.written == []


def test_what_was_bad_from_the_start_is_not_held_against_the_run() -> None:
    port = _Port()
    port.held["w|exp_avg"][0, 0] = math.nan
    check = _checked(port)
    port.held["w|exp_avg"][0, 1] = math.nan
    assert not _one_step(check)


def test_tensors_that_the_optimizer_made_anew_are_counted_from_the_next_whole_look() -> None:
    port = _Port()
    check = _checked(port)
    port.held["w|exp_avg"] = torch.zeros(4, 3)
    port.state.updates = 10
    assert not _one_step(check)
    port.held["w|exp_avg"][0, 0] = math.inf
    port.state.updates = 11
    assert _one_step(check) == ["w|exp_avg"]


def test_inference_tensors_have_no_count_and_are_left_out() -> None:
    port = _Port()
    with torch.inference_mode():
        port.held["mean"] = torch.zeros(3)
    assert not _one_step(_checked(port))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_a_small_state_is_looked_at_whole_every_time(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    port = _Port()
    monkeypatch.setattr(state_check, "SMALL_BYTES", sum(t.nbytes for _, t in port.state_tensors()))
    check = _checked(port)
    assert not _one_step(check)
    port.held["w|exp_avg_sq"].data[0, 0] = value  # torch does not count it
    assert _one_step(check) == ["w|exp_avg_sq"]


def test_moments_that_the_first_update_makes_are_known_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_check, "SMALL_BYTES", 2**20)
    port = _Port()
    moments, port.held, port.state.updates = port.held, {}, 0
    check = _checked(port)
    port.held, port.state.updates = moments, 1
    assert not _one_step(check)
    port.state.updates = 2
    port.held["w|exp_avg_sq"].data[0, 0] = math.inf
    assert _one_step(check) == ["w|exp_avg_sq"]
