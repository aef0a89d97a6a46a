"""The supervised dynamic loss scaler.

Same rule as ``torch.amp.GradScaler`` (factor 2 down at an overflow, factor 2 up after
``growth_interval`` steps without one; defaults 65536, 2, 0.5, 2000), with what that one lacks: a
floor. There, about 166 overflows in a row drive the scale to 0 and the next healthy batch makes the
weights NaN; here the scale never leaves [min_scale, max_scale].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ScalerSettings:
    """How the loss scale moves."""

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    min_scale: float = 2.0**-4
    max_scale: float = 2.0**24
    max_retries: int = 8
    """How often one batch may be tried again at a smaller scale before the batch is given up."""


class LossScaler:
    """The current scale and its history: three numbers."""

    def __init__(self, settings: ScalerSettings) -> None:
        self.settings = settings
        self.scale = settings.init_scale
        self.clean_steps = 0
        self.retries = 0
        self._scale_before_retries = settings.init_scale

    def committed(self) -> None:
        """A step was committed: grow when it is time."""
        self.retries = 0
        self.clean_steps += 1
        if self.clean_steps >= self.settings.growth_interval:
            self.scale = min(self.scale * self.settings.growth_factor, self.settings.max_scale)
            self.clean_steps = 0

    def back_off(self) -> None:
        """An overflow: the same batch will be tried at a smaller scale."""
        if self.retries == 0:
            self._scale_before_retries = self.scale
        self.retries += 1
        self.scale = max(self.scale * self.settings.backoff_factor, self.settings.min_scale)
        self.clean_steps = 0

    def give_up(self, *, blame_batch: bool) -> None:
        """The batch overflowed at every scale tried.

        With ``blame_batch`` the scale returns to where it was before the retries: one bad batch must
        not leave later ones in underflow. Without, it stays low: several batches in a row overflowed.
        """
        if blame_batch and self.retries:
            self.scale = self._scale_before_retries
        self.retries = 0

    @property
    def exhausted(self) -> bool:
        """No smaller scale is left to try for this batch."""
        return self.retries >= self.settings.max_retries or self.scale <= self.settings.min_scale

    def state(self) -> dict[str, Any]:
        """JSON-able state."""
        return {
            "scale": self.scale,
            "clean_steps": self.clean_steps,
            "retries": self.retries,
            "scale_before_retries": self._scale_before_retries,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` gave."""
        self.scale = float(state["scale"])
        self.clean_steps = int(state["clean_steps"])
        self.retries = int(state["retries"])
        self._scale_before_retries = float(state["scale_before_retries"])
