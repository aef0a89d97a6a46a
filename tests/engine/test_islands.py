"""The backward pass of an island is one of fp32 wherever it is started, and leaves the regions as they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finitune.engine.islands import Island, Visit
from finitune.numerics.compute import autocast_regions

LARGE = 3e5
"""Beyond fp16, whose largest number is 65504."""


class Block(nn.Module):
    """What lies between its two products is beyond fp16; what comes out is not."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * LARGE) / LARGE


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), Block(), nn.Linear(4, 4))


def gradients(model: nn.Module, *, backward_inside: bool, again: bool = False) -> dict[str, Tensor]:
    """Of a step whose forward runs in fp16, and whose backward does so too or not."""
    model.zero_grad()
    x = torch.ones(3, 4, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        out = checkpoint(model, x, use_reentrant=False) if again else model(x)
        if backward_inside:
            out.float().square().sum().backward()
    if not backward_inside:
        out.float().square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("again", [False, True])
def test_its_gradients_are_finite_and_the_same_inside_of_the_half_region_and_outside(
    model: nn.Sequential, again: bool
) -> None:
    assert not gradients(model, backward_inside=False)["1.up.weight"].isfinite().all(), "without an island"
    island = Island(model[1], list[Visit]())
    inside = gradients(model, backward_inside=True, again=again)
    outside = gradients(model, backward_inside=False, again=again)
    island.close()
    assert all(g.isfinite().all() for g in inside.values())
    assert all(torch.equal(inside[n], outside[n]) for n in ("1.up.weight", "1.down.weight"))


def test_the_regions_are_as_before_after_the_backward_pass(model: nn.Sequential) -> None:
    island = Island(model[1], list[Visit]())
    with torch.autocast("cpu", torch.float16):
        was = autocast_regions()
        model(torch.ones(3, 4)).float().sum().backward()
        assert autocast_regions() == was
    island.close()


def test_what_lies_outside_stays_in_half(model: nn.Sequential) -> None:
    seen = []
    model[0].register_full_backward_hook(lambda _m, _i, made: seen.append(made[0].dtype))
    island = Island(model[1], list[Visit]())
    gradients(model, backward_inside=True)
    island.close()
    assert seen == [torch.float16]


def test_an_island_without_gradients_is_fine(model: nn.Sequential) -> None:
    island = Island(model[1], list[Visit]())
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert model(torch.ones(3, 4)).isfinite().all()
    island.close()
