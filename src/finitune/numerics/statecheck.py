"""The state check after an update: one pass over the training state, one host read."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from finitune.numerics.norms import bad_names, tensor_norms


def bad_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Names of the floating tensors that hold a NaN, an inf, or values whose squares sum beyond fp32.

    An L2 norm per tensor in one multi-tensor kernel costs a tenth of ``isfinite().all()``; it is not finite where an
    element is not (IEEE 754: NaN and inf survive squares and sums).
    """
    named = [(n, t) for n, t in tensors if t.is_floating_point() and t.numel()]
    if not named:
        return []
    norms_P = tensor_norms([t.detach() for _, t in named])
    if bool(torch.isfinite(norms_P.sum())):
        return []
    return bad_names([n for n, _ in named], norms_P)
