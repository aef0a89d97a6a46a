"""A healthy guarded run has the bits of the plain loop: weights, moments, rates, scale, generators, losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finitune

Batch = dict[str, Tensor]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.GELU(), nn.Linear(16, 1))


def mse(model: nn.Module, batch: Batch) -> Tensor:
    return ((model(batch["x"]) - batch["y"]) ** 2).mean()


def half_mse(model: nn.Module, batch: Batch) -> Tensor:
    with torch.autocast("cpu", torch.float16):
        out = model(batch["x"])
    return ((out.float() - batch["y"]) ** 2).mean()


def batches(count: int, rows: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(rows, 6, generator=generator), "y": torch.randn(rows, 1, generator=generator)}
        for _ in range(count)
    ]


def plain(
    model: nn.Module, optimizer: Any, loss_fn: Any, steps: list[Any], scheduler: Any, scaler: Any, limit: float | None
) -> list[float]:
    """What a tutorial would write."""
    losses = []
    for step in steps:
        micros, total = step if isinstance(step, list) else [step], torch.zeros(())
        for micro in micros:
            loss = loss_fn(model, micro) / len(micros)
            (scaler.scale(loss) if scaler else loss).backward()
            total = total + loss.detach()
        if scaler and limit:
            scaler.unscale_(optimizer)
        if limit:
            nn.utils.clip_grad_norm_(model.parameters(), limit)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        if scheduler:
            scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(total))
    return losses


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [v for slots in optimizer.state.values() for v in slots.values() if isinstance(v, Tensor)]


def check_equal(
    make: Callable[[Any], torch.optim.Optimizer],
    steps: list[Any],
    *,
    loss_fn: Any = mse,
    schedule: Any = None,
    scaler: Any = None,
    limit: float | None = None,
) -> tuple[Any, Any]:
    ends = []
    for guarded in (False, True):
        model = net()
        optimizer = make(model.parameters())
        scheduler = schedule(optimizer) if schedule else None
        scaling = scaler() if scaler else None
        torch.manual_seed(3)
        if guarded:
            with finitune.guard(model, optimizer, loss_fn, scheduler, scaling, max_grad_norm=limit) as guard:
                losses = [guard.step(step).loss for step in steps]
                assert guard.incidents == []
        else:
            losses = plain(model, optimizer, loss_fn, steps, scheduler, scaling, limit)
        ends.append((model, optimizer, losses, scheduler, scaling, torch.get_rng_state()))
    a, b = ends
    assert a[2] == b[2]
    assert all(torch.equal(x, y) for x, y in zip(a[0].parameters(), b[0].parameters(), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(moments(a[1]), moments(b[1]), strict=True))
    assert torch.equal(a[5], b[5])
    assert [g["lr"] for g in a[1].param_groups] == [g["lr"] for g in b[1].param_groups]
    if schedule:
        assert a[3].state_dict() == b[3].state_dict()
    if scaler:
        assert a[4].state_dict() == b[4].state_dict()
    return a, b


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
        lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
        lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
    ],
    ids=["adamw", "fused", "sgd"],
)
def test_a_healthy_run_has_the_bits_of_the_plain_loop(make: Any, limit: float | None) -> None:
    check_equal(make, batches(12), schedule=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 2e-2, 20), limit=limit)


def test_accumulation_has_the_bits_of_the_plain_loop() -> None:
    ones = batches(16)
    check_equal(lambda p: torch.optim.AdamW(p, 1e-2), [ones[i : i + 2] for i in range(0, 16, 2)], limit=1.0)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("limit", [None, 1.0])
def test_a_scaler_starts_up_as_in_the_plain_loop(limit: float | None) -> None:
    a, _ = check_equal(
        lambda p: torch.optim.AdamW(p, 1e-3),
        batches(16),
        loss_fn=half_mse,
        schedule=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1.0 / (1 + k)),
        scaler=lambda: torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=4),
        limit=limit,
    )
    assert a[4].get_scale() < 2.0**24  # it did skip


def test_rates_that_the_loop_sets_itself_are_kept() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    with finitune.guard(model, optimizer, mse) as guard:
        for k, batch in enumerate(batches(4)):
            optimizer.param_groups[0]["lr"] = 0.01 / (k + 1)
            assert guard.step(batch).reading.lr == 0.01 / (k + 1)
