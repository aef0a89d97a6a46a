"""A look at a few elements of every weight, before and after an update: did training move anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch

ELEMENTS_PER_TENSOR = 256


def sample(tensors: Sequence[torch.Tensor], per_tensor: int = ELEMENTS_PER_TENSOR) -> torch.Tensor:
    """Up to ``per_tensor`` evenly spaced elements of each tensor as one fp32 vector (a copy)."""
    with torch.no_grad():
        return torch.cat([_spaced(t.detach().reshape(-1), per_tensor) for t in tensors]).float()


def _spaced(flat: torch.Tensor, count: int) -> torch.Tensor:
    stride = max(1, flat.numel() // count)
    return flat[::stride][:count]


def movement(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float]:
    """(||after - before|| / ||before||, share of elements that changed) of two samples.

    The ratio is NaN where the weights are all zero. One host read.
    """
    change = after - before
    weights = torch.linalg.vector_norm(before)
    changed = (change != 0).float().mean()
    moved, size, share = torch.stack([torch.linalg.vector_norm(change), weights, changed]).tolist()
    return (moved / size if size > 0 else float("nan")), share
