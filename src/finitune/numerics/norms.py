"""Norms of many tensors in one pass each. fp32 accumulation whatever the dtype of the tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def tensor_norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """L2 norm of each tensor, shape (P,), fp32, on the device of the first.

    A NaN or inf anywhere in a tensor makes its norm NaN or inf, and so does a sum of squares beyond
    fp32 (a norm above 1.8e19). One multi-tensor kernel where torch has it: 2-norms cost a tenth of
    inf-norms or ``isfinite().all()`` on a CPU.
    """
    if not tensors:
        return torch.zeros(0)
    # torch does not narrow: one fp64 tensor among them makes all sums fp64.
    wide = any(t.dtype == torch.float64 for t in tensors)
    with torch.no_grad():
        norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float64 if wide else torch.float32)
        device = norms[0].device
        return torch.stack([n.to(device, non_blocking=True) for n in norms]).float()


def total_norm(norms_P: torch.Tensor) -> torch.Tensor:
    """L2 norm of all tensors together from their own norms (P,); a 0-dim fp32 tensor."""
    norm: torch.Tensor = torch.linalg.vector_norm(norms_P.float())
    return norm


def first_bad(tensor: torch.Tensor) -> tuple[int, float] | None:
    """Flat index and value of the first non-finite element of a floating tensor; None if all are finite."""
    bad = torch.isfinite(tensor.detach().flatten()).logical_not_().nonzero()
    if bad.numel() == 0:
        return None
    index = int(bad[0])
    return index, float(tensor.detach().flatten()[index])


def bad_names(names: Sequence[str], norms_P: torch.Tensor) -> list[str]:
    """Names of the tensors whose norm is not finite."""
    finite = torch.isfinite(norms_P).tolist()
    return [name for name, good in zip(names, finite, strict=True) if not good]
