"""A step of the past tells a loss that is computed otherwise from weights or data that have changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from engine.experiments.port import HalfPort, causal_loss, llama, text
from engine.experiments.test_single import made, trained
from finitune.core import registry
from finitune.core.incident import Result, Trigger
from finitune.core.types import Finding, Severity
from finitune.engine.lab import Lab


def lab_with(factor: float, micros: int = 2) -> Lab:
    """A sound run of micro-batches; after it, the loss is ``factor`` times what it was."""
    model = llama(layers=1)
    now = {"factor": 1.0}

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return causal_loss(model, batch) * now["factor"]

    batches = [[part for piece in text(micros) for part in piece] for _ in range(10)]
    port = HalfPort(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loss, batches)
    lab = trained(6, Trigger.SILENT, port=port)
    now["factor"] = factor
    losses = lab.case.past["recent_losses"]
    kept = [{"base": b, "loss": losses[b], "grad_norm": 1.0} for b in (5, 3, 1)]
    lab.case = replace(lab.case, finding=Finding("OPT121", Severity.WARNING), past={**lab.case.past, "kept": kept})
    return lab


@pytest.mark.parametrize("factor", [2.0, 0.5, 3.0])
def test_another_formula_gives_another_loss_on_old_weights_and_old_data(factor: float) -> None:
    lab = lab_with(factor)
    found, suspects = made(lab, "past_loss")
    assert found.result is Result.BAD
    assert found.numbers["factor"] == pytest.approx(factor, rel=1e-4)
    assert (found.numbers["micros"], found.numbers["past_step"]) == (2, 6)
    assert not suspects
    assert lab.port.state.step == 6


def test_the_same_formula_gives_the_recorded_loss() -> None:
    found, _ = made(lab_with(1.0), "past_loss")
    assert found.result is Result.GOOD
    assert found.numbers["now"] == pytest.approx(found.numbers["was"], rel=1e-6)


def test_without_a_state_of_before_it_is_not_made() -> None:
    lab = lab_with(2.0)
    lab.case = replace(lab.case, past={**lab.case.past, "kept": []})
    assert made(lab, "past_loss")[0].result is Result.NOT_RUN
    assert not registry.load("experiments", "past_loss").wanted(lab.case)
