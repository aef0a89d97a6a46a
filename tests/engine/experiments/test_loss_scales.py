"""The largest scale at which gradients are finite, and whether what is left of them there is worth having."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.experiments.port import HalfPort, causal_loss, llama, text
from engine.experiments.test_single import made
from engine.experiments.zoo import until_failure
from finitune.core.incident import Result


def overflowing(scale: float) -> Any:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return until_failure(HalfPort(model, optimizer, causal_loss, text(5), half=True, scale=scale))


@pytest.mark.parametrize("power", [24, 60, 100])
def test_gradients_that_overflow_at_the_runs_scale_only_are_good_at_smaller_ones(power: int) -> None:
    found, _ = made(overflowing(2.0**power), "loss_scales")
    numbers = found.numbers
    assert found.result is Result.GOOD
    assert numbers["good_at"][0] == 2.0**-24
    assert numbers["bad_at"][-1] == 2.0**power
    # Known to within a factor of 16, with room for gradients four times as large, in a handful of replays.
    assert numbers["scale"] == numbers["good_at"][-1] / 4
    assert numbers["good_at"][-1] == 2.0**18 or numbers["good_at"][-1] * 16 >= numbers["bad_at"][0]
    assert found.replays <= 7
    assert (numbers["suits"], numbers["back_to"]) == (True, None)
    assert numbers["error"] < 2.0**-8


def test_a_scale_that_lets_one_loud_part_fit_and_loses_the_rest_does_not_suit() -> None:
    lab = overflowing(2.0**24)
    loud(lab.port.model.model.layers[1].mlp.down_proj, 2.0**36)
    found, _ = made(lab, "loss_scales")
    assert found.result is Result.GOOD
    assert found.numbers["good_at"][-1] < 2.0**-8
    assert not found.numbers["suits"]
    assert found.numbers["error"] > 0.5


def loud(module: torch.nn.Module, factor: float) -> None:
    """The gradient inside a module is so many times as large; outside, and for its weights, it is as ever."""

    class Times(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, states: torch.Tensor, by: float) -> torch.Tensor:
            ctx.by = by
            return states.view_as(states)

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
            return gradients[0] * ctx.by, None

    module.register_forward_pre_hook(lambda _m, args: (Times.apply(args[0], 1 / factor), *args[1:]))
    module.register_forward_hook(lambda _m, _args, output: Times.apply(output, factor))
    for parameter in module.parameters():
        parameter.register_hook(lambda gradient: gradient / factor)
