"""A softmax over nothing: torch's attention gives 0, and the step is good without the loss of a row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from engine.experiments.port import HalfPort, llama, text
from engine.experiments.test_single import made
from engine.experiments.test_wanted import FP16, FP32, case_of
from engine.experiments.zoo import until_failure
from finitune.core.incident import Result, Suspect, Trigger
from finitune.engine.experiments import safe_softmax
from finitune.engine.lab import Lab
from finitune.engine.localise import localise

EAGER = {**FP32, "attention": "eager"}
SOFTMAX = Suspect("op", "aten._softmax in a", {"op": "aten._softmax.default", "module": "a", "phase": "forward"})


def blind(loss_factor: float = 1.0) -> Lab:
    """At the 6th step the mask of one row forbids its first token everything."""
    model, batches = llama(), text(8)
    model.config._attn_implementation = "eager"
    width = batches[0][0]["input_ids"].shape[1]
    for number, (batch,) in enumerate(batches, start=1):
        rows = len(batch["labels"])
        batch["seen"] = torch.ones(width, width).tril().expand(rows, 1, width, width).clone()
        if number == 6:
            batch["seen"][1, 0, 0] = 0.0

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        mask = torch.where(batch["seen"] > 0, 0.0, -torch.inf)
        out = model(input_ids=batch["input_ids"], labels=batch["labels"], attention_mask=mask)
        total: torch.Tensor = out.loss * (1.0 if batch["seen"][:, 0, 0, 0].all() else loss_factor)
        return total

    return until_failure(HalfPort(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loss, batches))


def test_the_step_is_good_where_a_softmax_over_nothing_is_0() -> None:
    lab = blind()
    lab.case = replace(lab.case, facts={**lab.case.facts, "attention": "eager"})
    assert safe_softmax.wanted(lab.case.with_suspects(*localise(lab, lab.case)))
    found, _ = made(lab, "safe_softmax")
    assert (found.result, lab.budget.replays > 0) == (Result.GOOD, True)
    assert "{" not in safe_softmax.SAYS[Result.GOOD].say(found.numbers)


def test_what_else_fails_fails_still() -> None:
    found, _ = made(blind(float("nan")), "safe_softmax")
    assert found.result is Result.BAD


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (case_of(Trigger.LOSS, EAGER, (), (), SOFTMAX), True),
        (case_of(Trigger.LOSS, FP32, (), (), SOFTMAX), False),
        (case_of(Trigger.LOSS, EAGER), False),
        (case_of(Trigger.LOSS, {**FP16, "attention": "eager"}, ("fp32",), (), SOFTMAX), False),
        (case_of(Trigger.LOSS, EAGER, (), ("scan_state",), SOFTMAX), False),
        (case_of(Trigger.RUNAWAY, EAGER, (), (), SOFTMAX), False),
    ],
)
def test_it_is_wanted_where_an_eager_softmax_fails_and_not_for_its_range(case: Any, expected: bool) -> None:
    assert safe_softmax.wanted(case) is expected
