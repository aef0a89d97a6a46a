"""Whether the gradient of a step depends on how its batch is cut into micro-batches.

A loop that divides the loss of each micro-batch by their number takes a mean of means. It is the gradient of the whole
batch only where all micro-batches have the same number of supervised tokens. Whether a loss is a mean over tokens is
not taken for granted: the micro-batches' losses and that of the whole batch must say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finitune.core.types import Finding
from finitune.engine.look.batch import IGNORED
from finitune.engine.look.codes_step import CUT_DEPENDS
from finitune.numerics.seeds import generators_kept

# A rounding in another order changes a loss by 1e-6 of it; a mean of means by far more than this. Micro-batches whose
# lengths differ by a third give a cosine of 0.98: less than the choice of the rows does, and not worth a word.
_SAME_LOSS = 2e-4
_SAME_COSINE = 0.95
_SAME_NORM = 0.1
_SAMPLE = 4096
LossOf = Callable[[Any], Tensor]
"""The loss of one micro-batch, (), with its graph."""
_UNEVEN = 2.0
"""A later step is worth a look where a micro-batch has so many times the supervised tokens of another."""
_MOST_MORE = 4
"""Later steps that are looked at: a loss that does not depend on the cutting does not do so in any of them."""


class Further:
    """Which later steps are looked at as well: by chance the micro-batches of the first one may be about even."""

    def __init__(self) -> None:
        self._left = _MOST_MORE

    def wants(self, micros: Sequence[Any]) -> bool:
        """The micro-batches of a step are uneven, and there were not many such looks yet; the counts cost nothing."""
        if self._left == 0 or not any(min(c, default=0) > 0 and max(c) >= _UNEVEN * min(c) for c in _countings(micros)):
            return False
        self._left -= 1
        return True


def accumulation(
    model: nn.Module,
    loss_of: LossOf,
    micros: Sequence[Any],
    parameters: Sequence[tuple[str, nn.Parameter]],
    pad_id: int = 0,
) -> tuple[Finding, ...]:
    """OPT112 where the mean over micro-batches is another gradient than the mean over tokens.

    Args:
        model: in eval mode inside, so that dropout plays no part; modes and generators are as before afterwards.
        loss_of: see :data:`LossOf`; asked without a graph too (``torch.no_grad()``).
        micros: the micro-batches of one step; of batches in other forms than mappings of tensors nothing is said.
        parameters: the trained parameters; their gradients are gone afterwards.
        pad_id: what ids are padded with to one width.

    It costs a forward and backward pass of the step, and one forward pass of the whole batch.
    """
    countings = [c for c in _countings(micros) if min(c, default=0) > 0]
    if len(micros) < 2 or all(len(set(c)) == 1 for c in countings):
        return ()
    whole = joined(micros, pad_id)
    if whole is None:
        return ()
    with _quietly(model), generators_kept():
        try:
            losses, gradients_MS = _each(loss_of, micros, parameters)
            with torch.no_grad():
                together = float(loss_of(whole))
        finally:
            _drop(parameters)
    # A loss that is no mean over its tokens: what the loop wants with it cannot be told from here.
    counts = next((c for c in countings if _is_token_mean(together, losses, c)), None)
    return () if counts is None else _compared(gradients_MS, counts)


def _countings(micros: Sequence[Any]) -> list[list[int]]:
    """Supervised tokens of each micro-batch: of all labels, and without the first of a row, which nothing predicts."""
    labels = [m.get("labels") if isinstance(m, Mapping) else None for m in micros]
    known = [t for t in labels if isinstance(t, Tensor) and t.dim() == 2]
    if len(known) != len(micros):
        return []
    return [[int((t[:, first:] != IGNORED).sum()) for t in known] for first in (1, 0)]


def _is_token_mean(together: float, losses: Sequence[float], counts: Sequence[int]) -> bool:
    by_token = sum(c * x for c, x in zip(counts, losses, strict=True)) / sum(counts)
    return math.isfinite(together) and abs(together - by_token) <= _SAME_LOSS * max(1.0, abs(by_token))


def _compared(gradients_MS: Tensor, counts: Sequence[int]) -> tuple[Finding, ...]:
    """The gradient as the loop makes it, against that of all tokens alike."""
    weights_M = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    cosine, ratio = _angle(gradients_MS.double().mean(0), weights_M @ gradients_MS.double())
    same = cosine >= _SAME_COSINE and abs(ratio - 1.0) <= _SAME_NORM
    if same or not (math.isfinite(cosine) and math.isfinite(ratio)):
        return ()
    told: dict[str, Any] = {
        "micros": len(counts),
        "fewest": min(counts),
        "most": max(counts),
        "weight": max(counts) / min(counts),
    }
    return (CUT_DEPENDS.find("loss_fn", cosine=cosine, ratio=ratio, fault_class="L", **told),)


def joined(micros: Sequence[Any], pad_id: int = 0) -> dict[str, Tensor] | None:
    """All rows of micro-batches as one: mappings of tensors of rows, padded on the right to one width.

    Labels are padded with -100, ids with ``pad_id``, everything else with 0; a scalar that all share is kept. None for
    batches of another form.
    """
    first = micros[0]
    if not all(isinstance(m, Mapping) and m.keys() == first.keys() for m in micros):
        return None
    whole = {}
    for name in first:
        parts = [m[name] for m in micros]
        if all(isinstance(p, Tensor) and p.dim() == 0 for p in parts) and all(bool(p == parts[0]) for p in parts):
            whole[name] = parts[0]
            continue
        rows = [p.shape[0] if isinstance(p, Tensor) and p.dim() else -1 for p in parts]
        if -1 in rows or len({p.dim() for p in parts}) > 1 or len({p.shape[2:] for p in parts}) > 1:
            return None
        fill = {"labels": IGNORED, "input_ids": pad_id}.get(name, 0)
        whole[name] = torch.cat(_widened(parts, fill))
    return whole


def _widened(parts: Sequence[Tensor], fill: int) -> list[Tensor]:
    if parts[0].dim() < 2:
        return list(parts)
    width = max(p.shape[1] for p in parts)
    tail = [0, 0] * (parts[0].dim() - 2)
    return [nn.functional.pad(p, (*tail, 0, width - p.shape[1]), value=fill) for p in parts]


def _angle(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Cosine between two vectors, and the ratio of their norms."""
    norms = float(torch.linalg.vector_norm(a)), float(torch.linalg.vector_norm(b))
    if not norms[0] * norms[1] > 0:
        return math.nan, math.nan
    return float(a @ b) / (norms[0] * norms[1]), norms[0] / norms[1]


def _each(
    loss_of: LossOf, micros: Sequence[Any], parameters: Sequence[tuple[str, nn.Parameter]]
) -> tuple[list[float], Tensor]:
    """Loss of each micro-batch, and a sample (M, S) of its gradient: copies would take the memory of the weights."""
    losses, gradients = [], []
    for micro in micros:
        _drop(parameters)
        with torch.enable_grad():
            loss = loss_of(micro)
            loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([_spread(p) for _, p in parameters]))
    return losses, torch.stack(gradients)


def _spread(parameter: nn.Parameter) -> Tensor:
    source = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    flat = source.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)].float().cpu()


def _drop(parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
    for _, parameter in parameters:
        parameter.grad = None


@contextmanager
def _quietly(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; every module in its own mode afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
