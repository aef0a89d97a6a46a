"""The state check after an update: one pass over the training state, one host read.

The pass is as fast as memory can be read: least and greatest value of a tensor (``torch.aminmax``) pass NaN and inf on
and cannot overflow themselves, in any number format, so what they say is exact. On a GPU, where one launch per tensor
would cost more than the reading, the first look is one multi-tensor L2 norm; a norm that is not finite may also be a
sum of squares beyond fp32, so a second look asks the tensors themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from finitune.numerics.norms import tensor_norms

ABSURD = 2.0**64
"""No weight or moment of a sound run is as large: its square does not fit into fp32. One flipped high bit is."""


def bad_tensors(tensors: Iterable[tuple[str, Tensor]], largest: float = math.inf) -> list[str]:
    """Names of the tensors that hold a NaN, an inf or a magnitude above ``largest``, in order.

    Every name of a tensor that has several is told; it is read once. Integers and tensors without data are fine.
    """
    named = [(name, values) for name, tensor in tensors if (values := _values(tensor)) is not None]
    once = {id(values): values for _, values in named}
    bad = _bad(list(once.values()), largest)
    return [name for name, values in named if id(values) in bad] if bad else []


def _values(tensor: Tensor) -> Tensor | None:
    """The numbers that can be bad; None where there are none."""
    if not tensor.is_floating_point():
        if not tensor.is_complex():
            return None
        tensor = torch.view_as_real(tensor.detach().resolve_conj())
    if not tensor.numel() or tensor.is_meta:
        return None
    if tensor.layout is torch.strided:
        return tensor
    stored = tensor.detach()
    stored = stored._values() if stored.layout is torch.sparse_coo else stored.values()
    return stored if stored.numel() else None


def _bad(tensors: Sequence[Tensor], largest: float) -> set[int]:
    """The ids of those that are not finite or too large."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    bad = set[int]()
    for (_, device), group in groups.items():
        bad |= _unbounded(group if device.type == "cpu" else _suspicious(group, largest), largest)
    return bad


def _suspicious(tensors: Sequence[Tensor], largest: float) -> list[Tensor]:
    """Those whose L2 norm is not finite in fp32, or so large that an element may be too large."""
    norms_P = tensor_norms([t.detach().float() if t.element_size() == 1 else t.detach() for t in tensors])
    good_P = torch.isfinite(norms_P) & (norms_P <= largest)
    if bool(good_P.all()):
        return []
    return [t for t, good in zip(tensors, good_P.tolist(), strict=True) if not good]


@torch.no_grad()
def _unbounded(tensors: Sequence[Tensor], largest: float) -> set[int]:
    """The ids of those whose least or greatest value is not finite or too large; one dtype, one device."""
    if not tensors:
        return set()
    # 8-bit floats cannot be compared in torch; as fp32 they can.
    comparable = [t.float() for t in tensors] if tensors[0].element_size() == 1 else tensors
    extremes = [value for t in comparable for value in torch.aminmax(t)]
    extremes_2P = torch.stack(extremes)
    good_2P = torch.isfinite(extremes_2P)
    if largest < math.inf:
        good_2P &= extremes_2P.abs().float() <= largest
    if bool(good_2P.all()):
        return set()
    good_P = good_2P.view(-1, 2).all(dim=1)
    return {id(t) for t, good in zip(tensors, good_P.tolist(), strict=True) if not good}
