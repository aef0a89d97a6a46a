"""One update: clip and un-scale in one factor, the same numbers fused or not; moments travel by name."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from finitune.train import optim


def model(seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return net


def give_gradients(net: nn.Module, scale: float = 1.0, seed: int = 1) -> float:
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
    return float(torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in net.parameters()]))) / scale


def settings(name: str, **kw: object) -> optim.OptimSettings:
    return optim.OptimSettings(name=name, lr=1e-2, weight_decay=0.1, **kw)


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adamw_torch"])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_three_steps_equal_plain_torch_with_clipping(name: str, scale: float) -> None:
    ours, theirs = model(), model()
    mine = optim.build(list(ours.named_parameters()), settings(name))
    matrices = [p for p in theirs.parameters() if p.dim() == 2]
    vectors = [p for p in theirs.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2)
    for step in range(3):
        norm = give_gradients(ours, scale, seed=step)
        optim.apply(mine, lr=1e-2, factor=optim.clip_factor(norm, 1.0) / scale)
        give_gradients(theirs, seed=step)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert a.grad is None


def test_sgd_takes_the_same_road() -> None:
    net = model()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = optim.build(list(net.named_parameters()), optim.OptimSettings(name="sgd", lr=0.5, betas=(0.0, 0.0)))
    norm = give_gradients(net)
    gradients = [p.grad.clone() for p in net.parameters()]
    optim.apply(optimizer, lr=0.5, factor=optim.clip_factor(norm, 1.0))
    for was, now, gradient in zip(before, net.parameters(), gradients, strict=True):
        torch.testing.assert_close(now.detach(), was - 0.5 * gradient / (norm + 1e-6))


def test_no_clipping_without_a_limit_or_below_it() -> None:
    assert optim.clip_factor(123.0, None) == 1.0
    assert optim.clip_factor(0.5, 1.0) == 1.0
    assert optim.clip_factor(4.0, 1.0) == pytest.approx(0.25)
    assert optim.clip_factor(0.0, 1.0) == 1.0


@pytest.mark.parametrize("norm", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_is_never_multiplied_with(norm: float) -> None:
    with pytest.raises(ValueError, match="cannot clip"):
        optim.clip_factor(norm, 1.0)


def test_moments_leave_and_return_bit_for_bit() -> None:
    first, second = model(), model()
    named = list(first.named_parameters())
    a = optim.build(named, settings("adamw_torch_fused"))
    give_gradients(first)
    optim.apply(a, lr=1e-2, factor=1.0)
    saved = {k: v.clone() for k, v in optim.moments(a, named)}
    assert {k.rpartition("|")[2] for k in saved} == {"exp_avg", "exp_avg_sq", "step"}
    second.load_state_dict(first.state_dict())
    b = optim.build(list(second.named_parameters()), settings("adamw_torch_fused"))
    optim.restore_moments(b, list(second.named_parameters()), saved)
    for net, optimizer in ((first, a), (second, b)):
        give_gradients(net, seed=9)
        optim.apply(optimizer, lr=1e-2, factor=1.0)
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), second.parameters(), strict=True))


def test_moments_of_a_foreign_model_are_refused() -> None:
    net = model()
    optimizer = optim.build(list(net.named_parameters()), settings("adamw_torch"))
    with pytest.raises(KeyError):
        optim.restore_moments(optimizer, list(net.named_parameters()), {"elsewhere|exp_avg": torch.zeros(1)})
