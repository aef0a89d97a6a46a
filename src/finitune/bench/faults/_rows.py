"""Rows and where they come up, a gradient that is spoilt on its way back, and the embedding of a model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from finitune.bench.workload import Batch, Workload


def first_step(load: Workload, *names: str) -> int:
    """The first step (from 1) with any of these rows."""
    return min(step for step, rows in enumerate(load.rows, 1) if set(names) & set(rows))


def found(load: Workload, *names: str) -> list[tuple[int, int]]:
    """(step, place in the step) wherever one of these rows comes up, in order."""
    return [(s, place) for s, rows in enumerate(load.rows, 1) for place, name in enumerate(rows) if name in names]


def all_rows(load: Workload) -> list[str]:
    """The names of all rows that come up, in a fixed order."""
    return sorted({name for rows in load.rows for name in rows}, key=lambda n: int(n.rpartition(":")[2]))


def twins(load: Workload, *wanted: Tensor) -> list[str]:
    """The names of all rows with one of these contents (token ids without padding): a data set may hold copies."""
    names: dict[str, None] = {}
    for step, rows in enumerate(load.rows, 1):
        for name, ids in zip(rows, load.row_ids(step), strict=True):
            if any(torch.equal(ids, row) for row in wanted):
                names[name] = None
    return list(names)


def in_micro(load: Workload, step: int, place: int) -> tuple[Batch, int]:
    """The micro-batch that a row of a step stands in, and its place there."""
    for micro in load.micros(step):
        if place < len(micro["input_ids"]):
            return micro, place
        place -= len(micro["input_ids"])
    raise IndexError(f"step {step} has no such row")


def width_of(load: Workload, step: int) -> int:
    """Tokens of a row of the first micro-batch of a step, padding among them."""
    return int(load.micros(step)[0]["input_ids"].shape[1])


class _BadGradient(torch.autograd.Function):
    """The identity; elements of its gradient are replaced by a value."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, bad: Tensor, value: float) -> Tensor:
        ctx.bad, ctx.value = bad, value
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0].masked_fill(ctx.bad, ctx.value), None, None


def bad_gradient(states: Tensor, bad: Tensor, value: float = math.nan) -> Tensor:
    """``states`` as they are; where ``bad`` (bool, of their shape) is set, the gradient is ``value``."""
    untyped: Any = _BadGradient
    out: Tensor = untyped.apply(states, bad, value)
    return out


def embedding(model: nn.Module) -> nn.Embedding:
    """Of the input tokens."""
    untyped: Any = model
    table: nn.Embedding = untyped.get_input_embeddings()
    return table
