"""Optimizer, schedule and weights that do not belong together are told by their counts and by a fingerprint."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from finitune.engine.look.resume import differences, fingerprint, not_of_one_run


class Run:
    """A model that is trained for some steps under a schedule."""

    def __init__(self, steps: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(8, 8)
        self.optimizer, self.scheduler = self.fresh()
        for _ in range(steps):
            self.model(torch.randn(4, 8)).square().mean().backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()

    def fresh(self) -> tuple[Any, Any]:
        optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0 / (1 + n))


@pytest.mark.parametrize("steps", [0, 1, 30])
def test_a_run_that_goes_on_as_it_was_is_fine(steps: int) -> None:
    run = Run(steps)
    assert not_of_one_run(run.optimizer, run.scheduler) == []
    assert not_of_one_run(run.optimizer) == []


def test_an_optimizer_that_was_not_loaded_is_told() -> None:
    run = Run(30)
    optimizer, scheduler = run.fresh()
    scheduler.load_state_dict(run.scheduler.state_dict())
    (found,) = not_of_one_run(optimizer, scheduler)
    assert (found.code, found.data["fault_class"]) == ("OPT113", "U")
    assert "last_epoch = 30" in found.data["differs"]
    plain = torch.optim.SGD(run.model.parameters(), 1e-3)
    assert not_of_one_run(plain, scheduler) == []  # it has nothing to lose


def test_a_schedule_that_was_not_loaded_is_told() -> None:
    run = Run(30)
    optimizer, scheduler = run.fresh()
    optimizer.load_state_dict(run.optimizer.state_dict())
    (found,) = not_of_one_run(optimizer, scheduler)
    assert "optimizer: step = 30" in found.data["differs"]


def test_moments_of_nothing_but_zeros_are_told() -> None:
    run = Run(30)
    for state in run.optimizer.state.values():
        state["exp_avg_sq"].zero_()
    assert "exp_avg_sq = 0" in not_of_one_run(run.optimizer, run.scheduler)[0].data["differs"]


def test_a_few_skipped_steps_are_no_other_run() -> None:
    run = Run(30)
    for _ in range(12):  # overflows at the start of an fp16 run
        run.scheduler.step()
    assert not_of_one_run(run.optimizer, run.scheduler) == []


def test_a_fingerprint_survives_json_and_names_what_differs() -> None:
    run = Run(30)
    then = json.loads(json.dumps(fingerprint(run.model, run.optimizer, run.scheduler)))
    assert differences(then, fingerprint(run.model, run.optimizer, run.scheduler)) == []
    run.optimizer.param_groups[0]["lr"] = 0.5
    for state in run.optimizer.state.values():
        state["exp_avg"].mul_(2.0)
    (found,) = differences(then, fingerprint(run.model, run.optimizer, run.scheduler))
    assert "lr: " in found.data["differs"]
    assert "exp_avg: " in found.data["differs"]
    assert "weights" not in found.data["differs"]


@pytest.mark.parametrize("then", [{}, {"lr": "x", "moments": 3}, {"weights": None}, {"moments": {"exp_avg": "?"}}])
def test_a_foreign_fingerprint_raises_nothing(then: dict[str, Any]) -> None:
    run = Run(2)
    differences(then, fingerprint(run.model, run.optimizer, run.scheduler))
