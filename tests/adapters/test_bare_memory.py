"""What a bare guard keeps copies of, and how much memory it lets them take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finitune
from finitune.adapters import bare_memory

WEIGHTS = 64 * 64
BYTES = 4 * WEIGHTS


class EightBit(torch.optim.Optimizer):
    """Sign descent with an 8-bit average."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros(p.shape, dtype=torch.int8))
                average.add_(p.grad.sign().to(torch.int8)).clamp_(-100, 100)
                p.add_(average.float() / 100, alpha=-group["lr"])


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def guarded(optimizer: Callable[[Any], torch.optim.Optimizer], **options: Any) -> finitune.BareGuard:
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False)
    return finitune.guard(model, optimizer(model.parameters()), loss, **options)


@pytest.mark.parametrize(
    ("optimizer", "factor"),
    [
        (lambda p: torch.optim.SGD(p, 1e-3), 1.0),
        (lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9), 2.0),
        (lambda p: torch.optim.AdamW(p, 1e-3), 3.0),
        (EightBit, 1.25),
    ],
    ids=["sgd", "momentum", "adamw", "8-bit"],
)
def test_the_ring_is_budgeted_by_what_the_optimizer_holds(
    monkeypatch: pytest.MonkeyPatch, optimizer: Any, factor: float
) -> None:
    monkeypatch.setattr(
        bare_memory, "psutil", SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=24 * BYTES))
    )
    with guarded(optimizer, memory_share=0.25) as guard:  # 6 weights' worth, and what is held already counts as free
        for _ in range(3):
            guard.ring.distance.steps = 1
            guard.step(torch.randn(4, 64))
        held = BYTES * 0.25  # of the one copy of the weights alone from before the first update
        assert guard.ring.num_slots == int((6 * BYTES + held) / (factor * BYTES + 64 * (factor == 3.0)))


def test_where_moments_leave_no_room_it_is_said_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bare_memory, "psutil", SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=8 * BYTES))
    )
    with guarded(lambda p: torch.optim.AdamW(p, 1e-3), memory_share=0.25) as guard:
        codes = []
        for _ in range(4):
            guard.ring.distance.steps = 1
            codes += [f.code for f in guard.step(torch.randn(4, 64)).findings]
        assert codes.count("SYS426") == 1
        assert guard.ring.num_slots == 0
        assert not guard.ring.taken
        bad = torch.full((4, 64), float("inf"))
        assert not guard.step(bad).committed
        assert guard.step(torch.randn(4, 64)).committed


class Adapted(nn.Module):
    """A frozen base with a small trained part, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(8, 1)
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.base(x)) * self.scale)


@pytest.mark.parametrize("name", ["base.weight", "base.bias", "scale"])
def test_a_frozen_tensor_that_goes_bad_is_repaired_from_its_copy(tmp_path: Path, name: str) -> None:
    model = Adapted()
    optimizer = torch.optim.AdamW(model.head.parameters(), 1e-2)
    tensor = {**dict(model.named_parameters()), **dict(model.named_buffers())}[name]
    was = tensor.detach().clone()
    with finitune.guard(model, optimizer, loss, run_dir=tmp_path) as guard:
        for number in range(12):
            if number == 8:
                tensor.data.view(-1)[3] = float("nan")
            guard.step(torch.randn(4, 8))
        [incident] = guard.incidents
        assert incident.remedy == "repair_tensor"
        assert any(s.name == name for s in incident.suspects)
        assert torch.equal(tensor, was)
        assert guard.num_batches == guard.port.state.updates == 12


def test_a_copy_that_was_changed_itself_is_not_taken() -> None:
    model = Adapted()
    with finitune.guard(model, torch.optim.SGD(model.head.parameters(), 1e-2), loss) as guard:
        good = guard.port.origin("base.weight")
        assert good is not None
        assert torch.equal(good, model.base.weight)
        good[0, 0] += 1
        assert guard.port.origin("base.weight") is None
        assert guard.port.origin("head.weight") is None
        assert guard.port.origin("no.such") is None


def test_without_room_no_copy_is_made() -> None:
    model = Adapted()
    with finitune.guard(model, torch.optim.SGD(model.head.parameters(), 1e-2), loss, memory_share=0.0) as guard:
        assert guard.port.origin("base.weight") is None
