"""What all clippers share: which norms they take, and the least factor they give."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

LARGEST_NORM = (2.0 - 2.0**-23) * 2.0**127
"""Largest fp32 number. Squares of differences of such norms are finite in fp64, so no statistic can overflow."""
LEAST_FACTOR = 2.0**-126
"""Smallest normal fp32 number: a factor is never 0, also not after its rounding to fp32."""
EPS = 1e-6
"""Added to a norm before it divides, as ``torch.nn.utils.clip_grad_norm_`` does."""


def is_norm(value: Any) -> bool:
    """A number from 0 to the largest of fp32; False for NaN and inf."""
    return isinstance(value, int | float) and 0.0 <= value <= LARGEST_NORM


def check_norm(value: float, what: str = "the gradient norm") -> float:
    """``value`` as a float. Raises ValueError for what must not enter a statistic (NaN, inf, negative)."""
    if not is_norm(value):
        raise ValueError(f"{what} is {value}: only a finite norm of 0 or more can be clipped by")
    return float(value)


def factor_to(limit: float | None, norm: float, eps: float = EPS) -> float:
    """min(1, limit / (norm + eps)), at least :data:`LEAST_FACTOR`; 1.0 without a limit."""
    if limit is None or not 0.0 < limit < math.inf:
        return 1.0
    return max(LEAST_FACTOR, min(1.0, limit / (norm + eps)))


def tightest(*limits: float | None) -> float | None:
    """The least of the limits that are positive numbers; None where there is none."""
    return min((limit for limit in limits if limit is not None and limit > 0.0), default=None)


def load_norm(state: Mapping[str, Any], key: str) -> float:
    """A norm out of a stored state. Raises ValueError where it is none."""
    return check_norm(state.get(key, math.nan), f"{key!r} of the stored state")


def load_norms(state: Mapping[str, Any], key: str) -> list[float]:
    """A list of norms out of a stored state. Raises ValueError where it is none."""
    values = state.get(key)
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"{key!r} of the stored state is {values!r}, not a list of norms")
    return [check_norm(v, f"{key!r} of the stored state") for v in values]


def load_count(state: Mapping[str, Any], key: str) -> int:
    """A count out of a stored state. Raises ValueError where it is none."""
    value = state.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{key!r} of the stored state is {value!r}, not a count")
    return value
