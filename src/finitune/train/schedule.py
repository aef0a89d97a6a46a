"""Learning-rate schedules: pure functions of the number of committed steps.

A schedule gives a factor in [0, 1] on the base rate. Warm-up is linear and starts above zero, so that
the first step already trains: factor (k + 1) / (warmup + 1) at k committed steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths in steps."""

    total_steps: int
    warmup_steps: int = 0
    decay_steps: int = 0
    """Length of the final decay; used by ``warmup_stable_decay`` only."""
    min_ratio: float = 0.0
    """Factor at the end of the schedule."""


def _warm(shape: Shape, k: int) -> float | None:
    return (k + 1) / (shape.warmup_steps + 1) if k < shape.warmup_steps else None


def _progress(start: int, end: int, k: int) -> float:
    return min(1.0, max(0.0, (k - start) / max(1, end - start)))


def _between(low: float, share: float) -> float:
    return low + (1.0 - low) * share


def cosine(shape: Shape) -> Schedule:
    """Warm-up, then half a cosine down to ``min_ratio`` (Loshchilov & Hutter, arXiv 1608.03983)."""

    def factor(k: int) -> float:
        warm = _warm(shape, k)
        share = 0.5 * (1 + math.cos(math.pi * _progress(shape.warmup_steps, shape.total_steps, k)))
        return warm if warm is not None else _between(shape.min_ratio, share)

    return factor


def linear(shape: Shape) -> Schedule:
    """Warm-up, then straight down to ``min_ratio``."""

    def factor(k: int) -> float:
        warm = _warm(shape, k)
        share = 1 - _progress(shape.warmup_steps, shape.total_steps, k)
        return warm if warm is not None else _between(shape.min_ratio, share)

    return factor


def constant(_shape: Shape) -> Schedule:
    """The base rate throughout, no warm-up."""
    return lambda _k: 1.0


def constant_with_warmup(shape: Shape) -> Schedule:
    """Warm-up, then the base rate."""

    def factor(k: int) -> float:
        warm = _warm(shape, k)
        return warm if warm is not None else 1.0

    return factor


def warmup_stable_decay(shape: Shape) -> Schedule:
    """Warm-up, plateau, linear decay over the last ``decay_steps`` (WSD, arXiv 2404.06395)."""

    def factor(k: int) -> float:
        warm = _warm(shape, k)
        share = 1 - _progress(shape.total_steps - shape.decay_steps, shape.total_steps, k)
        return warm if warm is not None else _between(shape.min_ratio, share)

    return factor


SCHEDULES: dict[str, Callable[[Shape], Schedule]] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "constant_with_warmup": constant_with_warmup,
    "warmup_stable_decay": warmup_stable_decay,
}
