"""Weights that no training can do with: not finite, never filled, or rows of a vocabulary out of all proportion."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from finitune.core.types import Finding
from finitune.engine.look.codes import BEYOND_HALF, HOT_ROWS, NEVER_FILLED, NOT_FINITE
from finitune.numerics.norms import tensor_norms

_SHOWN = 8
_HALF = (torch.float16, torch.bfloat16)
HALF_MAX = 65504.0
"""Largest finite fp16 number (IEEE 754 binary16)."""
# Rows of real vocabularies (trained ones, and random ones) stay within a factor of some 5 of their median.
HOT_ROW = 20.0
"""A row is out of proportion when it is this many times as long as the median row."""
USUAL_ROW = 5.0
"""Where one row is out of proportion, those beyond the usual are of the same kind: its neighbours, drawn as it was."""
_MOST_HOT = 0.25
_TINY = 1e-30
_ODD_SHARE = 0.01
_HUGE = 1e3
"""A matrix whose root mean square is this many times that of the median matrix of the model was not trained so."""


def _floating(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(n, p.detach()) for n, p in model.named_parameters() if p.is_floating_point() and p.numel()]


def _place(mask: Tensor) -> tuple[int, ...]:
    """Index of the first True."""
    flat = int(mask.reshape(-1).to(torch.uint8).argmax())
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), mask.shape))


def _shown_index(place: tuple[int, ...]) -> str:
    return ", ".join(map(str, place))


# -- not finite ------------------------------------------------------------------------------------------------------


def not_finite(model: nn.Module) -> list[Finding]:
    """MOD110 for each weight with a NaN or inf, trained or not, and for each buffer with a NaN, at most eight.

    An infinite element of a buffer is none: masks are made of them.
    """
    named = _floating(model)
    norms_P = tensor_norms([p for _, p in named]) if named else torch.zeros(0)
    # A sum of squares can leave fp32 where no element is at fault: the elements themselves are asked then.
    suspicious = [named[i] for i in (~torch.isfinite(norms_P)).nonzero().flatten().tolist()]
    bad = [(n, p, ~torch.isfinite(p)) for n, p in suspicious if not bool(torch.isfinite(p).all())]
    buffers = [(n, b, b.isnan()) for n, b in model.named_buffers() if b.is_floating_point() and b.numel()]
    bad += [(n, b, mask) for n, b, mask in buffers if bool(mask.any())]
    return [_not_finite(model, n, t, mask, len(bad)) for n, t, mask in bad[:_SHOWN]]


def _not_finite(model: nn.Module, name: str, tensor: Tensor, mask: Tensor, count: int) -> Finding:
    place, num_bad = _place(mask), int(mask.sum())
    value = float(tensor[place])
    cast = tensor.dtype in _HALF and math.isinf(value)
    return NOT_FINITE.find(
        name,
        name=name,
        dtype=str(tensor.dtype).removeprefix("torch."),
        bad=num_bad,
        total=tensor.numel(),
        index=_shown_index(place),
        value=str(value),
        count=count,
        told=_told(model, tensor, mask, num_bad),
        fault_class="B" if cast else "H",
    )


def _told(model: nn.Module, tensor: Tensor, mask: Tensor, num_bad: int) -> str:
    """What the pattern says, as a plain sign that reads in every language."""
    if num_bad == tensor.numel():
        return "(torch.empty?)"
    is_table = any(table.data_ptr() == tensor.data_ptr() for _, table in tables(model))
    rows = mask.any(1).nonzero().flatten().tolist() if is_table else []
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    return f"(pad_token_id = {pad})" if rows and rows == [pad] else ""


def beyond_half(model: nn.Module) -> list[Finding]:
    """MOD116 where products are in fp16 and a finite weight cannot be cast to it; only matrices are cast."""
    found = [(n, p) for n, p in _floating(model) if p.dim() > 1 and p.dtype != torch.float16]
    large = [(n, p) for n, p in found if math.isfinite(m := float(p.abs().amax())) and m > HALF_MAX]
    if not large:
        return []
    name, tensor = large[0]
    place = _place(tensor.abs() > HALF_MAX)
    index, value = _shown_index(place), float(tensor[place])
    return [BEYOND_HALF.find(name, name=name, index=index, value=value, count=len(large), fault_class="B")]


# -- never filled ----------------------------------------------------------------------------------------------------


def never_filled(model: nn.Module, known: Collection[str] = ()) -> list[Finding]:
    """MOD115 for matrices that hold what memory held before: numbers out of all scale, or a sprinkle of 1e-40.

    ``known``: tensors that were reported already.
    """
    matrices = [(n, p) for n, p in _floating(model) if p.dim() > 1 and n not in known]
    if not matrices:
        return []
    norms = tensor_norms([p for _, p in matrices]).tolist()
    sizes = [norm / math.sqrt(p.numel()) for norm, (_, p) in zip(norms, matrices, strict=True)]
    usual = median([s for s in sizes if s > 0] or [0.0])
    found = []
    for (name, tensor), rms in zip(matrices, sizes, strict=True):
        limit = _HUGE * usual
        tiny, huge = _odd_shares(tensor, limit)
        # One large element makes a large norm as well: memory that was never written is odd all over.
        if tiny > _ODD_SHARE or (rms > limit > 0 and huge > _ODD_SHARE):
            found.append(_never_filled(name, tensor, rms, usual, tiny))
    return found[:_SHOWN]


def _odd_shares(tensor: Tensor, limit: float) -> tuple[float, float]:
    """Shares, on a sample, of elements smaller than any initialisation draws and not 0, and of those beyond a limit."""
    flat = tensor.reshape(-1)
    part = flat[:: max(1, flat.numel() // 65536)].float().abs()
    return float(((part > 0) & (part < _TINY)).float().mean()), float((part > limit).float().mean())


def _never_filled(name: str, tensor: Tensor, rms: float, usual: float, tiny: float) -> Finding:
    largest = float(tensor.abs().amax())
    shape = "x".join(map(str, tensor.shape))
    numbers: dict[str, Any] = {"largest": largest, "rms": rms, "median": usual, "tiny": 100 * tiny}
    return NEVER_FILLED.find(name, name=name, shape=shape, fault_class="H", **numbers)


# -- rows of the vocabulary ------------------------------------------------------------------------------------------


def tables(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Embedding and output head, each once: what the model itself names, else every embedding of many rows."""
    named: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        named.setdefault(id(parameter), name)
    modules = [_asked(model, "get_input_embeddings"), _asked(model, "get_output_embeddings")]
    chosen = [m for m in modules if m is not None] or [m for m in model.modules() if isinstance(m, nn.Embedding)]
    seen: set[int] = set()
    for module in chosen:
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and id(weight) not in seen:
            seen.add(id(weight))
            yield named.get(id(weight), "weight"), weight.detach()


def _asked(model: nn.Module, getter: str) -> Any:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def hot_rows(model: nn.Module) -> list[Finding]:
    """MOD113 where a few rows of a vocabulary are many times as long as the median row."""
    return [f for name, table_VD in tables(model) if (f := _hot_rows(name, table_VD)) is not None]


def hot_row_ids(table_VD: Tensor) -> tuple[int, ...]:
    """The rows of a vocabulary that do not fit, the longest first: those beyond the usual where one of them is out of
    all proportion. None where too many are.
    """
    one, usual = _out_of_proportion(table_VD), _out_of_proportion(table_VD, USUAL_ROW)
    return usual[0] if one is not None and usual is not None else ()


def _out_of_proportion(table_VD: Tensor, limit: float = HOT_ROW) -> tuple[tuple[int, ...], float, float] | None:
    """Rows longer than ``limit`` medians, the norm of the longest, and the median norm; None where there are none."""
    if not table_VD.is_floating_point() or table_VD.shape[0] < _SHOWN:
        return None
    norms_V = torch.linalg.vector_norm(table_VD, dim=1, dtype=torch.float32)
    usable_V = norms_V[torch.isfinite(norms_V) & (norms_V > 0)]
    if not usable_V.numel():
        return None
    middle = float(usable_V.median())
    hot = (norms_V > limit * middle).nonzero().flatten()
    if not len(hot) or len(hot) > _MOST_HOT * table_VD.shape[0]:
        return None
    rows = hot[norms_V[hot].argsort(descending=True, stable=True)].tolist()
    return tuple(rows), float(norms_V[rows[0]]), middle


def _hot_rows(name: str, table_VD: Tensor) -> Finding | None:
    found = _out_of_proportion(table_VD)
    if found is None:
        return None
    rows, norm, middle = found
    more = f", ... ({len(rows)})" if len(rows) > _SHOWN else ""
    return HOT_ROWS.find(
        name,
        name=name,
        count=len(rows),
        num_rows=table_VD.shape[0],
        limit=HOT_ROW,
        median=middle,
        tokens=", ".join(map(str, sorted(rows)[:_SHOWN])) + more,
        token=rows[0],
        norm=norm,
        fault_class="O",
    )
