"""How a step is cut is looked at in later steps too, where the first one happens to be cut evenly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import finitune
from adapters.test_bare_look import batch_of, cross_entropy, words


def found(counts: list[tuple[int, int]], *, check: bool = True) -> tuple[list[int], int]:
    """Steps at which OPT112 is told, and how often the loss function was called; supervised tokens by micro-batch."""
    model, asked = words(), []

    def loss(model: Any, batch: Any) -> torch.Tensor:
        asked.append(1)
        return cross_entropy(model, batch)

    told = []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with finitune.guard(model, optimizer, loss, check_accumulation=check) as guard:
        for step, (few, many) in enumerate(counts, start=1):
            outcome = guard.step([batch_of(step, few), batch_of(100 + step, many)])
            told += [step for f in outcome.findings if f.code == "OPT112"]
    return told, len(asked)


def test_the_first_uneven_step_tells_it_once() -> None:
    assert found([(5, 5), (4, 5), (1, 6), (1, 6), (1, 6)])[0] == [3]


def test_even_steps_cost_nothing_more() -> None:
    assert found([(5, 5)] * 6) == ([], 12)


def test_without_being_asked_for_nothing_is_looked_at() -> None:
    assert found([(1, 6)] * 4, check=False) == ([], 8)


@pytest.mark.parametrize("steps", [8, 16])
def test_only_a_few_uneven_steps_are_looked_at(steps: int) -> None:
    """Of a loss that is told nothing about, four more, three calls each."""
    model, asked = words(), []

    def loss(model: Any, batch: Any) -> torch.Tensor:
        asked.append(1)
        total = torch.nn.functional.cross_entropy(
            model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten(), reduction="sum"
        )
        return total / 14

    with finitune.guard(model, torch.optim.AdamW(model.parameters(), 1e-2), loss, check_accumulation=True) as guard:
        for step in range(steps):
            outcome = guard.step([batch_of(step, 1), batch_of(100 + step, 6)])
            assert not [f for f in outcome.findings if f.code == "OPT112"]
    assert len(asked) == 2 * steps + 5 * 3
