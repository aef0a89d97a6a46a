"""Good values for what a look found wrong in a model before its first step, where the model itself tells them.

- a computed buffer (MOD112): what its module computes from the configuration. No checkpoint holds it, so whoever loads
  what is trained here will have that value again: training with another one would be lost.
- rows of a vocabulary out of all proportion (MOD113), in a table that is trained: the mean of all other rows, as
  ``resize_token_embeddings(mean_resizing=True)`` of transformers gives new tokens (Hewitt 2021, "Initializing New Word
  Embeddings for Pretrained Language Models": a token that is no likelier than the average one raises no loss). A frozen
  table is not saved with the run, so it is left alone.

Nothing is changed here but inside of :meth:`Repair.in_place` and by :meth:`Repair.put`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finitune.core.types import Finding
from finitune.engine.look.buffers import differing, rebuilt
from finitune.engine.look.weights import hot_row_ids, hot_rows, tables

BUFFERS, ROWS = "computed_buffers", "mean_rows"
"""The experiments that tell whether such a repair is one."""


@dataclass(frozen=True, slots=True)
class Repair:
    """Good values for some tensors of a model."""

    experiment: str
    finding: Finding
    names: tuple[str, ...]
    wrong: tuple[Tensor, ...]
    """The tensors themselves."""
    good: tuple[Tensor, ...]
    """Their values, in the same order."""
    rows: tuple[tuple[int, ...], ...] = ()
    """Of tables: the rows that are changed, the longest first."""

    @torch.no_grad()
    def put(self) -> None:
        """The good values, in place."""
        for tensor, value in zip(self.wrong, self.good, strict=True):
            tensor.copy_(value)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the good values are in the model; afterwards the very bits of before."""
        held = [t.detach().clone() for t in self.wrong]
        try:
            self.put()
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(self.wrong, held, strict=True):
                    tensor.copy_(value)


def repairs(model: nn.Module, *, is_trained: bool = False) -> list[Repair]:
    """Every repair that the model as it stands asks for; none for a sound one.

    Args:
        model: before a step.
        is_trained: the run has made updates: its rows are what they have become, only buffers can have been lost.
    """
    found = (of_buffers(model), None if is_trained else of_rows(model))
    return [r for r in found if r is not None]


def of_buffers(model: nn.Module) -> Repair | None:
    """All computed buffers that differ from what the configuration gives, in the shape that they should have."""
    found = [(name, buffer, value) for name, buffer, value in rebuilt(model) if buffer.shape == value.shape]
    told = {f.where: f for f in differing(model)} if found else {}
    found = [part for part in found if part[0] in told]
    if not found:
        return None
    names, wrong, good = zip(*found, strict=True)
    return Repair(BUFFERS, told[names[0]], names, wrong, good)


@torch.no_grad()
def of_rows(model: nn.Module) -> Repair | None:
    """The rows that do not fit, of all tables that are trained."""
    told = {f.where: f for f in hot_rows(model)}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    # Rows that are not finite are another fault: they are found, and dated, when a batch reads them.
    hot = [(n, t, _finite(t, hot_row_ids(t))) for n, t in tables(model) if n in told and n in trained]
    found = [(n, t, _means(t, rows), rows) for n, t, rows in hot if rows]
    if not found:
        return None
    names, wrong, good, rows = zip(*found, strict=True)
    return Repair(ROWS, told[names[-1]], names, wrong, good, rows)


def _finite(table_VD: Tensor, rows: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(row for row in rows if bool(torch.isfinite(table_VD[row]).all()))


def _means(table_VD: Tensor, rows: tuple[int, ...]) -> Tensor:
    """The table with these rows set to the mean of the others, which is taken in fp32."""
    others_V = torch.ones(len(table_VD), dtype=torch.bool, device=table_VD.device)
    others_V[list(rows)] = False
    others_V &= torch.isfinite(table_VD).all(1)
    good_VD = table_VD.clone()
    good_VD[list(rows)] = table_VD[others_V].float().mean(0).to(table_VD.dtype)
    return good_VD
