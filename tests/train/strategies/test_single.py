"""One process agrees with itself, and puts things where they train."""

from __future__ import annotations

import torch
from torch import nn

from finitune.train.strategies.single import Strategy


def test_single_prepares_runs_backward_and_sums() -> None:
    strategy = Strategy(torch.device("cpu"))
    model = strategy.prepare(nn.Linear(2, 1))
    strategy.backward(model(torch.ones(1, 2)).sum())
    assert torch.equal(model.weight.grad, torch.ones(1, 2))
    assert (strategy.sum_tokens(7), strategy.rank, strategy.world_size) == (7, 0, 1)
