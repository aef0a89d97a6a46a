"""The direction of an update is told exactly, and never held against an optimizer that goes its own way on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finitune.engine.direction import Direction, Look, looking

Make = Callable[[Any], torch.optim.Optimizer]


class Net(nn.Module):
    """A few layers that learn to copy."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.tanh(self.a(x)))
        return out


def walked(make: Make, steps: int = 12, net: nn.Module | None = None, blocks: int = 64) -> list[list[Direction]]:
    """What each update of a run did."""
    net = net or Net()
    optimizer, generator = make(net.parameters()), torch.Generator().manual_seed(1)
    found = []
    for step in range(steps):
        x = torch.randn(6, 24, generator=generator, dtype=torch.float32).to(next(net.parameters()).dtype)
        sign = -1.0 if optimizer.param_groups[0].get("maximize") else 1.0
        optimizer.zero_grad()
        (sign * (net(x) - x).float().square().mean()).backward()
        look = Look(list(net.named_parameters()), blocks, 8, shift=8 * step)
        with looking(optimizer, look):
            optimizer.step()
        found.append(look.compare())
    return found


def counted(found: list[list[Direction]], what: str) -> tuple[int, int]:
    """Elements that counted, and those that went the wrong way."""
    chosen = [d for looks in found for d in looks if d.what == what]
    return sum(d.num for d in chosen), sum(d.num_wrong for d in chosen)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=5.0),
        lambda p: torch.optim.AdamW(p, 1e-3, fused=True, amsgrad=True),
        lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.5),
        lambda p: torch.optim.Adam(p, 1e-2, maximize=True),
        lambda p: torch.optim.Adam(p, 1e-2, betas=(0.0, 0.9)),
        lambda p: torch.optim.SGD(p, 0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.99, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.5, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, 1e-3),
        lambda p: torch.optim.Adamax(p, 1e-2),
    ],
)
def test_no_element_of_a_sound_optimizer_goes_the_wrong_way(make: Make) -> None:
    found = walked(make)
    num, wrong = counted(found, "weight")
    assert num > 1000
    assert wrong == 0
    assert counted(found, "moment")[1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_half_weights_is_no_direction(dtype: torch.dtype) -> None:
    found = walked(lambda p: torch.optim.AdamW(p, 3e-3, eps=1e-4), net=Net().to(dtype))
    num, wrong = counted(found, "weight")
    assert num > 500
    assert wrong == 0


class Uphill(torch.optim.AdamW):
    """Goes the other way."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        was = [(p, p.clone()) for g in self.param_groups for p in g["params"]]
        super().step(closure)
        for p, old in was:
            p.copy_(2 * old - p)


class Home(torch.optim.Optimizer):
    """A home-made optimizer with a moment; ``bent`` says what is wrong with it."""

    bent, name = "", "exp_avg"

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                moment = self.state[p].setdefault(self.name, torch.zeros_like(p))
                moment.mul_(0.9).add_(-p.grad if self.bent == "moment" else p.grad, alpha=0.1)
                p.add_(moment.sign(), alpha=group["lr"] if self.bent == "weight" else -group["lr"])


def home(**fields: str) -> Make:
    return lambda p: type("Home", (Home,), fields)(p)


@pytest.mark.parametrize("make", [lambda p: Uphill(p, 1e-3), home(bent="weight")])
def test_an_update_that_goes_uphill_does_so_in_every_element(make: Make) -> None:
    num, wrong = counted(walked(make), "weight")
    assert num > 1000
    assert wrong == num


def test_a_moment_that_runs_from_the_gradient_is_told_of_an_optimizer_that_claims_to_be_plain() -> None:
    named = lambda p: type("FusedAdam", (Home,), {"bent": "moment"})(p)  # noqa: E731
    found = walked(named)
    assert counted(found, "weight")[1] == 0
    num, wrong = counted(found, "moment")
    assert num > 1000
    assert wrong == num


@pytest.mark.parametrize(
    "make", [home(bent="moment"), home(bent="weight", name="own"), lambda p: torch.optim.Adafactor(p)]
)
def test_nothing_is_said_where_the_first_moment_is_not_known_to_be_one(make: Make) -> None:
    assert counted(walked(make), "weight") == (0, 0)


@pytest.mark.parametrize("lr", [0.0, 1e-12])
def test_what_does_not_move_does_not_count(lr: float) -> None:
    assert counted(walked(lambda p: torch.optim.AdamW(p, lr, weight_decay=0.0)), "weight") == (0, 0)


def test_frozen_strided_and_tiny_parameters_are_passed() -> None:
    net = Net()
    net.a.weight.requires_grad_(False)
    net.b.weight = nn.Parameter(torch.randn(48, 24).T)
    net.c = nn.Parameter(torch.ones(1))
    found = walked(lambda p: torch.optim.AdamW([q for q in p if q.requires_grad], 1e-3), net=net)
    assert {d.name for looks in found for d in looks} == {"a.bias", "b.bias"}


def test_a_run_that_is_looked_at_has_the_bits_of_one_that_is_not() -> None:
    looked, plain = Net(), Net()
    walked(lambda p: torch.optim.AdamW(p, 1e-2), net=looked)
    optimizer, generator = torch.optim.AdamW(plain.parameters(), 1e-2), torch.Generator().manual_seed(1)
    for _ in range(12):
        x = torch.randn(6, 24, generator=generator)
        optimizer.zero_grad()
        (plain(x) - x).float().square().mean().backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(looked.parameters(), plain.parameters(), strict=True))
    assert not optimizer._optimizer_step_pre_hooks


def test_nothing_is_hooked_afterwards_and_an_update_that_was_not_made_tells_nothing() -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    look = Look(list(net.named_parameters()), 4, 8)
    with pytest.raises(KeyError), looking(optimizer, look):
        raise KeyError
    assert not optimizer._optimizer_step_pre_hooks
    assert look.compare() == []
