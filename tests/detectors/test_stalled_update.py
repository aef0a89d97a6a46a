"""Stalled update: lost bf16 updates and gradients of exactly 0."""

from __future__ import annotations

import math

import pytest

from finitune.core.robust import History
from finitune.core.types import Finding, Reading
from finitune.detectors.stalled_update import Config, detect


def judge(*changed: float, lr: float = 1e-5, grad_norm: float = 1.0, supervised: int | None = 9) -> Finding | None:
    history = History()
    for share in changed:
        history.committed(2.0, 1.0, changed_fraction=share)
    reading = Reading(step=9, loss=2.0, grad_norm=grad_norm, lr=lr, supervised_tokens=supervised)
    return detect(history, reading, Config())


def test_weights_that_do_not_move_are_reported() -> None:
    found = judge(0.005, 0.005, 0.004, 0.0)
    assert found is not None
    assert (found.code, found.veto) == ("OPT001", False)
    assert found.data["percent"] == pytest.approx(0.45)


def test_one_step_that_moves_is_enough_to_be_silent() -> None:
    assert judge(0.0, 0.0, 0.0, 0.5) is None


def test_too_few_measurements_prove_nothing() -> None:
    assert judge(0.0, 0.0, 0.0) is None
    assert judge() is None


@pytest.mark.parametrize("lr", [0.0, -0.0, math.nan])
def test_without_a_learning_rate_nothing_should_move(lr: float) -> None:
    """Step 1 of a warm-up has rate 0; a log without rates says nothing."""
    assert judge(0.0, 0.0, 0.0, 0.0, lr=lr) is None


def test_a_gradient_of_zero_is_reported_at_once() -> None:
    found = judge(grad_norm=0.0)
    assert found is not None
    assert found.code == "OPT001"


@pytest.mark.parametrize("supervised", [0, None])
def test_a_gradient_of_zero_is_right_where_nothing_is_supervised(supervised: int | None) -> None:
    assert judge(grad_norm=0.0, supervised=supervised) is None


def test_bf16_weights_really_stall_and_fp32_weights_do_not(traces) -> None:
    """AdamW's first updates at learning rate 1e-5 on weights of 0.1 to 1, in both formats."""
    torch = pytest.importorskip("torch")

    def fractions(dtype) -> list[float]:
        weight = torch.linspace(0.1, 1.0, 1000).to(dtype).requires_grad_()
        optimizer = torch.optim.AdamW([weight], lr=1e-5, weight_decay=0.0)
        shares = []
        for _ in range(6):
            before = weight.detach().clone()
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            shares.append((weight.detach() != before).float().mean().item())
        return shares

    assert judge(*fractions(torch.bfloat16)) is not None
    assert judge(*fractions(torch.float32)) is None


def test_rewards_that_are_all_alike_are_no_stall(traces) -> None:
    """A policy gradient then has neither loss nor gradient, from the first step on and again and again."""
    from finitune.detectors import stalled_update

    pattern = [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0] * 20
    steps = [Reading(step=i, loss=0.1 * n, grad_norm=n, lr=1e-5, supervised_tokens=9) for i, n in enumerate(pattern)]
    assert traces.show(steps, traces.of(stalled_update)) == []


@pytest.mark.parametrize("loss", [0.0, 2.0])
def test_a_gradient_that_dies_is_reported_after_sixteen_steps(traces, loss: float) -> None:
    from finitune.detectors import stalled_update

    norms = [1.0] * 30 + [0.0] * 20
    steps = [Reading(step=i + 1, loss=loss, grad_norm=n, lr=1e-5, supervised_tokens=9) for i, n in enumerate(norms)]
    assert [step for step, _ in traces.show(steps, traces.of(stalled_update))] == [46, 47, 48, 49, 50]
