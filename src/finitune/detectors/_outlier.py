"""One rule for "far above the recent past", shared by the detectors of spikes and explosions.

A value is an outlier when it is above the median of the window by a factor *and* by many robust sigmas
(so that noisy runs get more room), *and* above everything seen lately (so that a rare kind of batch,
invisible to the median absolute deviation, is no outlier the second time, and a lasting change of level
is reported once). All in the log domain: losses and gradient norms vary by factors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice

from finitune.core.robust import Window

# A window of equal values has no spread at all; real ones vary by a few per cent.
_SIGMA_FLOOR = 0.05


@dataclass(frozen=True, slots=True)
class Rule:
    """The limits; the fields are those of the detectors' settings."""

    min_steps: int
    num_sigmas: float
    factor: float
    recent_steps: int
    recent_factor: float


@dataclass(frozen=True, slots=True)
class Outlier:
    """How far out a value is."""

    median: float
    limit: float
    times: float
    """value / median"""


def outlier(log_window: Window, value: float, rule: Rule) -> Outlier | None:
    """Judge ``value`` by the committed past; None for a value that is no outlier, not positive, or not finite."""
    if not (math.isfinite(value) and value > 0) or len(log_window) < rule.min_steps:
        return None
    centre = log_window.median()
    spread = rule.num_sigmas * max(log_window.sigma(), _SIGMA_FLOOR)
    recent = max(islice(log_window, max(0, len(log_window) - rule.recent_steps), None))
    log_limit = max(centre + max(spread, math.log(rule.factor)), recent + math.log(rule.recent_factor))
    if math.log(value) <= log_limit:
        return None
    return Outlier(bounded_exp(centre), bounded_exp(log_limit), bounded_exp(math.log(value) - centre))


def bounded_exp(value: float) -> float:
    """e^value; inf where a double cannot hold it."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
