"""Learning rates of the past: which one the run bore, and since when it is a higher one. Pure numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from finitune.core.incident import Trigger
from finitune.engine.case import Case
from finitune.engine.experiments import _tools as tools

GROWN = 1.5
"""A rate so many times the highest of before is another one; the runaway detector asks for as much."""
STOOD_STEPS = 4
"""Steps without growth before a rise: a warm-up rises all the time, and no rate of it is one that the run has borne."""
MAX_STEPS = 32
"""Longer ago a rise is not looked for: what went well for so long was not too high by far."""
_DIGITS = 12
# Logarithms are kept of the rates, which loses the last bits.
_SAME = 1e-6


@dataclass(frozen=True, slots=True)
class Raised:
    """The rate left, upwards, a level at which it had stood."""

    num_updates: int
    """Updates since then, the first at a higher rate counted."""
    borne: float
    """The highest rate of before."""
    highest: float
    """The highest rate since."""


def raised(rates: Sequence[float]) -> tuple[Raised, ...]:
    """Every such place among the rates of updates, oldest first, that is not too long ago; the newest place first."""
    found = []
    for first in range(len(rates) - 1, STOOD_STEPS - 1, -1):
        if len(rates) - first > MAX_STEPS:
            break
        borne, highest = max(rates[:first]), max(rates[first:])
        stood = max(rates[first - STOOD_STEPS : first]) <= rates[first - STOOD_STEPS] * (1 + _SAME)
        if stood and rates[first] > borne * (1 + _SAME) and highest >= GROWN * borne:
            found.append(Raised(len(rates) - first, exact(borne), exact(highest)))
    return tuple(found)


def raised_in(case: Case) -> tuple[Raised, ...]:
    """The same for the updates that led to a failure: those of before it, and its own where that is what failed."""
    rates = tools.finite(case.past.get("recent_rates", ()))
    now = case.reading.lr
    if case.trigger is Trigger.UPDATE and now is not None:
        rates.append(now if math.isfinite(now) else math.inf)  # a schedule that divides by 0
    return raised([r for r in rates if r > 0])


def exact(rate: float) -> float:
    """The rate as it was set, as far as its logarithm still tells."""
    return float(f"{rate:.{_DIGITS}g}")
