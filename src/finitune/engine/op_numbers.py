"""Numbers of a tensor that holds bad values: how many, which, and what did not fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

HALF = (torch.float16, torch.bfloat16)
MAX_LISTED = 16


def watchable(value: Any) -> bool:
    """A dense floating (or complex) tensor with elements that can be read."""
    return (
        isinstance(value, torch.Tensor)
        and (value.is_floating_point() or value.is_complex())
        and value.layout == torch.strided
        and not value.is_meta
        and not value.is_quantized
        and value.numel() > 0
    )


def _real(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    # aminmax does not know the 8-bit formats
    return tensor if tensor.element_size() > 1 else tensor.float()


def extremes(tensor: torch.Tensor) -> tuple[float, float]:
    """Least and greatest value in one pass; NaN where one element is NaN."""
    low, high = torch.aminmax(_real(tensor))
    if tensor.device.type == "cpu":
        return float(low), float(high)
    both: list[float] = torch.stack([low, high]).tolist()  # one wait for the device
    return both[0], both[1]


def is_bad(tensor: torch.Tensor) -> bool:
    """Whether an element is NaN or inf."""
    return not all(map(math.isfinite, extremes(tensor)))


def peak(tensor: torch.Tensor) -> float:
    """Largest finite magnitude; 0.0 where no element is finite."""
    low, high = extremes(tensor)
    if math.isfinite(low) and math.isfinite(high):
        return max(abs(low), abs(high))
    real = _real(tensor)
    return float(torch.where(torch.isfinite(real), real, torch.zeros_like(real)).abs().amax())


def half_max(dtype: torch.dtype) -> float | None:
    """Largest number of a half format; None for others."""
    return float(torch.finfo(dtype).max) if dtype in HALF else None


def constant_of(tensor: torch.Tensor) -> float:
    """The first bad value of a tensor that holds one."""
    flat = _real(tensor).flatten()
    return float(flat[torch.isfinite(flat).logical_not_()][0])


def numbers_of_bad(tensor: torch.Tensor, bad: torch.Tensor | None = None) -> dict[str, Any]:
    """Shape, counts, the first bad element, and of a matrix the bad rows and columns (at most 16 of each).

    ``bad``: which elements count as bad; by default those that are not finite.
    """
    if bad is None:
        bad = torch.isfinite(tensor.detach()).logical_not_()
    places = bad.nonzero()
    data: dict[str, Any] = {"dtype": str(tensor.dtype)[6:], "shape": list(tensor.shape), "num_bad": len(places)}
    data |= {"num_elements": tensor.numel()}
    if len(places) == 0:
        return data
    first = places[0]
    value = _real(tensor)[tuple(first)] if not tensor.is_complex() else torch.tensor(math.nan)
    data |= {"index": first.tolist(), "value": float(value)}
    if tensor.dim() == 2:
        rows, columns = places[:, 0].unique(), places[:, 1].unique()
        data |= {"row": int(rows[0]), "rows": rows[:MAX_LISTED].tolist(), "num_rows": len(rows)}
        data |= {"column": int(columns[0]), "columns": columns[:MAX_LISTED].tolist(), "num_columns": len(columns)}
    return data


def measured(
    func: Any, args: Any, kwargs: Mapping[str, Any], out: torch.Tensor, input_peaks: Sequence[float]
) -> dict[str, Any]:
    """What the bad output of an operation and its finite inputs look like.

    ``input_peaks``: largest finite magnitude of each floating input, before the operation.
    """
    low, _ = extremes(out)
    limit = half_max(out.dtype)
    data: dict[str, Any] = {"dtype": str(out.dtype)[6:], "shape": list(out.shape), "num_elements": out.numel()}
    data |= {"num_bad": int(torch.isfinite(out).logical_not_().sum()), "num_nan": int(torch.isnan(out).sum())}
    data |= {"amax": peak(out), "input_amax": max(input_peaks, default=0.0)}
    data |= {"input_amaxes": list(input_peaks)[:4], "input_finite": True}
    data |= {"half_max": limit, "nan": math.isnan(low)}
    value = _in_fp32(func, args, kwargs, out)
    data["value"] = value
    top = value if value is not None and math.isfinite(value) else data["amax"]
    data["headroom_bits"] = math.log2(limit / top) if limit and top > 0 else None
    return data


def _in_fp32(func: Any, args: Any, kwargs: Mapping[str, Any], out: torch.Tensor) -> float | None:
    """The largest magnitude that a half output would have had in fp32; None where that cannot be told.

    inf and NaN say that it is no matter of range.
    """
    if out.dtype not in HALF or func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags:
        return None
    if func._schema.name == "aten::_to_copy":
        return peak(args[0])

    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.dtype in HALF else value

    if any(v in HALF for v in tree_leaves((args, kwargs)) if isinstance(v, torch.dtype)):
        return None
    try:
        with torch.autocast(out.device.type, enabled=False):
            again = [
                t for t in tree_leaves(func(*tree_map(wide, args), **tree_map(wide, dict(kwargs)))) if watchable(t)
            ]
    except (RuntimeError, TypeError, NotImplementedError):  # not every kernel exists in fp32 for these arguments
        return None
    low, high = extremes(again[0]) if again else (math.nan, math.nan)
    return abs(low) if abs(low) > abs(high) or math.isnan(low) else abs(high)
