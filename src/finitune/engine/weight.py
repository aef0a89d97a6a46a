"""Weights: how well one cause fits a case, with its reasons. Plain values, no tensors.

A cause is *named* only where an experiment made the failure go away (it flipped the outcome), or where a scan or a
count showed the thing itself. Hints, however many, make it *suspected*, never more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SUSPECTED_AT_MOST = 0.5
"""Confidence of a cause that no experiment names."""
REFUTED = 0.25
"""A reason against that leaves no more than this share of the confidence takes the name away as well."""


@dataclass(frozen=True, slots=True)
class Weight:
    """How well a cause fits a case."""

    confidence: float
    """0..1; how well the evidence fits, not a probability."""
    named: bool
    """An experiment flipped the outcome, or a scan or count showed the thing itself."""
    reasons_for: tuple[str, ...] = ()
    """Names of experiments, or "verdict", "trigger", "localised", "facts"."""
    reasons_against: tuple[str, ...] = ()
    where: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Fills the page of the cause's code."""


class Reasons:
    """Collects reasons for and against one cause, then weighs them.

    Reasons for add up as independent ones do, 1 - (1 - a)(1 - b)...; each reason against multiplies by a factor
    below 1. So one more reason against never raises a confidence, and hints never add up to certainty.
    """

    def __init__(self) -> None:
        self._doubt = 1.0
        self._factor = 1.0
        self._proved = False
        self._refuted = False
        self._pro: list[str] = []
        self._contra: list[str] = []

    def proof(self, holds: bool, reason: str, worth: float) -> None:
        """The outcome flipped, or the thing itself was seen: this names the cause."""
        self.hint(holds, reason, worth)
        self._proved = self._proved or holds

    def hint(self, holds: bool, reason: str, worth: float) -> None:
        """It fits, and proves nothing. ``worth``: 0..1."""
        if holds:
            self._doubt *= 1.0 - worth
            if reason not in self._pro:
                self._pro.append(reason)

    def against(self, holds: bool, reason: str, factor: float) -> None:
        """It does not fit. ``factor``: 0..1, what is left of the confidence."""
        if holds:
            self._factor *= factor
            self._refuted = self._refuted or factor <= REFUTED
            if reason not in self._contra:
                self._contra.append(reason)

    def weight(self, where: str = "", **data: Any) -> Weight | None:
        """The sum of it; None where nothing speaks for the cause."""
        if not self._pro:
            return None
        named = self._proved and not self._refuted
        confidence = (1.0 - self._doubt) * self._factor
        if not named:
            confidence = min(confidence, SUSPECTED_AT_MOST)
        return Weight(confidence, named, tuple(self._pro), tuple(self._contra), where, {"where": where or "-", **data})
