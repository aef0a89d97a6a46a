"""The plain formula beside the run's optimizer: a wrong one is named by the course it would not have taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.experiments.port import HalfPort, causal_loss, llama, text
from engine.experiments.test_single import made, trained
from finitune.core.incident import Result, Trigger
from finitune.engine.conditions import NotPossible
from finitune.engine.experiments import reference_optimizer
from finitune.engine.lab import Lab


class Wrong(torch.optim.AdamW):
    """Some of its updates are not those of AdamW: ``bent(weight before, weight after, updates)`` is what comes out."""

    bent: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        every = [p for g in self.param_groups for p in g["params"]]
        was = [p.clone() for p in every]
        super().step(closure)
        for old, p in zip(was, every, strict=True):
            p.copy_(type(self).bent(old, p, int(self.state[p]["step"])))


def sign_error(after: int) -> type[Wrong]:
    """The step goes uphill from an update on."""
    return type("Uphill", (Wrong,), {"bent": staticmethod(lambda old, new, n: 2 * old - new if n > after else new)})


def stopped(kind: type[torch.optim.Optimizer], trigger: Trigger, *, steps: int = 14, lr: float = 1e-2) -> Lab:
    """A run with this optimizer, stopped by a failure of this kind."""
    model = llama(layers=1)
    lab = trained(steps, trigger, port=HalfPort(model, kind(model.parameters(), lr=lr), causal_loss, text(30)))
    if trigger is Trigger.GRADIENT:
        lab.case = replace(lab.case, reading=replace(lab.case.reading, grad_norm=math.nan))
    return lab


@pytest.mark.parametrize("trigger", [Trigger.RUNAWAY, Trigger.GRADIENT, Trigger.LOSS, Trigger.OUTLIER])
def test_a_sign_error_is_named_because_the_formula_does_not_rise(trigger: Trigger) -> None:
    found, suspects = made(stopped(sign_error(4), trigger), "reference_optimizer")
    assert found.result is Result.GOOD
    assert found.numbers["max_rel_difference"] == pytest.approx(2.0, rel=0.05)
    assert found.numbers["losses"][-1] < found.numbers["losses"][0]
    assert suspects[0].name == found.numbers["parameter"]
    assert "{" not in reference_optimizer.SAYS[Result.GOOD].say(found.numbers)


@pytest.mark.parametrize("lr", [1e-3, 0.3])
def test_a_rate_that_is_too_high_is_not_the_optimizers_fault(lr: float) -> None:
    found, suspects = made(stopped(torch.optim.AdamW, Trigger.RUNAWAY, lr=lr), "reference_optimizer")
    assert (found.result, suspects) == (Result.BAD, ())
    assert found.numbers["max_rel_difference"] < 1e-3


def test_an_optimizer_that_differs_on_purpose_and_is_no_worse_is_not_called_wrong() -> None:
    """Half of the step, as a cautious variant makes: with the plain formula the run goes no better."""
    half = type("Cautious", (Wrong,), {"bent": staticmethod(lambda old, new, _n: old + 0.5 * (new - old))})
    found, suspects = made(stopped(half, Trigger.RUNAWAY, lr=0.3), "reference_optimizer")
    assert (found.result, suspects) == (Result.BAD, ())
    assert found.numbers["max_rel_difference"] == pytest.approx(0.5, rel=0.05)


def test_the_last_committed_step_is_looked_at_where_no_batch_is_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = stopped(sign_error(4), Trigger.RUNAWAY)
    real, newest = lab.port.batch, lab.before.step

    def batch(step: int | None = None) -> Any:
        if step is None and lab.port.state.step >= newest:
            raise NotPossible("the loop has not handed one over yet")
        return real(step)

    monkeypatch.setattr(lab.port, "batch", batch)
    assert made(lab, "reference_optimizer")[0].result is Result.GOOD
    assert made(lab, "update_share")[0].result is not Result.NOT_RUN


def test_it_leaves_no_trace() -> None:
    lab = stopped(sign_error(4), Trigger.RUNAWAY)
    before = {n: t.clone() for n, t in lab.port.state_tensors()}
    made(lab, "reference_optimizer")
    assert all(torch.equal(t, before[n]) for n, t in lab.port.state_tensors())
    assert not lab.port.optimizer._optimizer_step_pre_hooks


class ByAnotherName(torch.optim.Optimizer):
    """Of the family by its name only: a formula of its own."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad.sign())


def test_a_finite_update_of_another_formula_is_no_fault_but_one_that_is_not_finite_is() -> None:
    kind = type("AdamSign", (ByAnotherName,), {})
    assert made(stopped(kind, Trigger.UPDATE, steps=2), "reference_optimizer")[0].result is Result.BAD
    lab = stopped(kind, Trigger.UPDATE, steps=2)
    lab.port.optimizer.param_groups[0]["lr"] = 1e-3
    real = ByAnotherName.step

    def spoils(self: Any, closure: Any = None) -> None:
        real(self, closure)
        with torch.no_grad():
            self.param_groups[0]["params"][0][0, 0] = math.nan

    type(lab.port.optimizer).step = torch.optim.Optimizer.profile_hook_step(spoils)  # type: ignore[method-assign]
    assert made(lab, "reference_optimizer")[0].result is Result.GOOD
