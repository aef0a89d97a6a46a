"""An update that goes uphill is seen on a replay; one that is wrong in another way, or right, is not called so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.experiments.port import HalfPort, causal_loss, llama, text
from engine.experiments.test_single import AdamWThatForgetsBiasCorrection, made, trained
from finitune.core import registry
from finitune.core.incident import Result, Trigger
from finitune.core.types import Finding, Severity
from finitune.engine.lab import Lab


class PartlyUphill(torch.optim.AdamW):
    """Climbs with its second group."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        was = [(p, p.clone()) for p in self.param_groups[1]["params"]]
        super().step(closure)
        for p, old in was:
            p.copy_(2 * old - p)


def lab_of(kind: type[torch.optim.Optimizer], code: str = "OPT120") -> Lab:
    model = llama(layers=1)
    mlp = [p for n, p in model.named_parameters() if ".mlp." in n]
    rest = [p for n, p in model.named_parameters() if ".mlp." not in n]
    port = HalfPort(model, kind([{"params": rest}, {"params": mlp}], lr=1e-3), causal_loss, text(8))  # type: ignore[call-arg]
    lab = trained(4, Trigger.SILENT, port=port)
    lab.case = replace(lab.case, finding=Finding(code, Severity.ERROR))
    return lab


def test_the_parameters_that_climb_are_named() -> None:
    found, suspects = made(lab_of(PartlyUphill), "update_direction")
    assert found.result is Result.BAD
    assert {s.name.rsplit(".", 2)[1] for s in suspects} == {"gate_proj", "up_proj", "down_proj"}
    assert found.numbers["percent"] == 100.0
    assert found.numbers["count"] == 3


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, AdamWThatForgetsBiasCorrection])
def test_an_update_that_descends_is_good_whatever_its_length(kind: type[torch.optim.Optimizer]) -> None:
    found, suspects = made(lab_of(kind), "update_direction")
    assert found.result is Result.GOOD
    assert not suspects


def test_an_optimizer_whose_moments_cannot_be_read_says_so() -> None:
    found, _ = made(lab_of(torch.optim.Adafactor), "update_direction")
    assert found.result is Result.NOT_RUN


def test_a_fault_of_the_loss_is_none_of_the_update() -> None:
    for code, expected in (("OPT120", True), ("OPT121", False)):
        case = lab_of(torch.optim.AdamW, code).case
        assert registry.load("experiments", "update_direction").wanted(case) is expected
        assert registry.load("experiments", "reference_optimizer").wanted(case) is expected
        assert registry.load("experiments", "update_share").wanted(case) is expected
