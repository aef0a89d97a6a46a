"""Adaptive clipping in a step of our own trainer; the clippers themselves are ``engine/clippers``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from finitune.core import registry
from finitune.core.types import Reading
from finitune.numerics.norms import tensor_norms


def clip(
    name: str,
    memory: Mapping[str, Any],
    max_grad_norm: float | None,
    reading: Reading,
    gradients: Sequence[torch.Tensor | None],
) -> tuple[float, dict[str, Any]]:
    """The factor for all gradients, and what the clipper remembers from now on.

    Args:
        name: of the clipper.
        memory: what it, or another one, remembered last: ``{"name", "state"}``, or nothing.
        max_grad_norm: what it does not exceed either.
        reading: of the step, whose gradients are finite.
        gradients: of all trainable parameters, the loss scale still in them. A clipper with a factor for each of them
            has them multiplied here, in place; the factor for all is then 1.
    """
    clipper = registry.load("clippers", name).Clipper(max_grad_norm)
    if memory.get("name") == name:
        clipper.load(memory["state"])
    there = [g for g in gradients if g is not None]
    norms = iter(tensor_norms(there).tolist())
    scale = reading.loss_scale or 1.0
    factor = clipper.factor(reading.grad_norm, [0.0 if g is None else next(norms) / scale for g in gradients])
    remembered = {"name": name, "state": clipper.state()}
    if isinstance(factor, float):
        return factor, remembered
    for gradient, own in zip(gradients, factor, strict=True):
        if gradient is not None and own != 1.0:
            gradient.mul_(own)
    return 1.0, remembered
