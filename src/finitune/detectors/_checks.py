"""Checks of detector settings: a wrong one is a ValueError that names the field."""

from __future__ import annotations

import math


def at_least(name: str, value: float, least: float) -> None:
    """``value`` is a finite number >= ``least``; NaN is refused."""
    if not (value >= least and math.isfinite(value)):
        raise ValueError(f"{name} = {value}: must be a finite number >= {least}")


def above(name: str, value: float, bound: float) -> None:
    """``value`` is a finite number > ``bound``; NaN is refused."""
    if not (value > bound and math.isfinite(value)):
        raise ValueError(f"{name} = {value}: must be a finite number > {bound}")


def probability(name: str, value: float) -> None:
    """``value`` is above 0 and below 1; NaN is refused."""
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} = {value}: must be a number between 0 and 1")
