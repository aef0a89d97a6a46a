"""``torch.amp.GradScaler`` as a plain loop uses it, with a floor under its scale.

A healthy run keeps the scaler's own bits. What differs from the plain loop: the scale never falls below the floor
(GradScaler has none: some 166 overflows in a row make it 0, and the next good batch then makes the weights NaN), and
nothing of it moves before a step was judged.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from finitune.engine.conditions import Conditions

MIN_SCALE = 2.0**-4


class Scaling:
    """What multiplies the loss: nothing, the run's scaler, or a fixed number under an experiment."""

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._known: float | None = None

    def is_live(self, conditions: Conditions) -> bool:
        """Whether the conditions leave the scaler any work."""
        return self.scaler is not None and conditions.loss_scale is None and conditions.precision is None

    def scale(self, conditions: Conditions) -> float | None:
        """The loss scale in force; None where there is none."""
        if not self.is_live(conditions):
            return conditions.loss_scale
        return max(min(self._own(), self.ceiling(conditions)), self.floor(conditions))

    @staticmethod
    def floor(conditions: Conditions) -> float:
        """The least scale."""
        return MIN_SCALE if conditions.min_scale is None else conditions.min_scale

    @staticmethod
    def ceiling(conditions: Conditions) -> float:
        """The largest scale."""
        return math.inf if conditions.max_scale is None else conditions.max_scale

    def left(self, conditions: Conditions) -> bool:
        """Whether a smaller scale is left to try."""
        scale = self.scale(conditions) if self.is_live(conditions) else None
        return scale is not None and scale > self.floor(conditions)

    def scaled(self, loss: Tensor, conditions: Conditions) -> Tensor:
        """The loss as backward takes it."""
        scale = self.scale(conditions)
        if scale is None:
            return loss
        if self.scaler is not None and self.is_live(conditions) and scale == self._own():
            scaled: Tensor = self.scaler.scale(loss)
            return scaled
        return loss * scale

    def unscale(self, optimizer: torch.optim.Optimizer, conditions: Conditions) -> None:
        """Divide the gradients by the scale, before they are clipped."""
        scale = self.scale(conditions)
        if self.scaler is not None and self.is_live(conditions):
            if scale is not None and scale != self._own():
                self._set(scale, self._tracker())
                self.scaler.scale(_zero_like_a_gradient(optimizer))  # a scaler that was never used has no scale yet
            self.scaler.unscale_(optimizer)
        elif scale is not None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(1.0 / scale)

    def step(self, optimizer: torch.optim.Optimizer, conditions: Conditions) -> None:
        """The update."""
        if self.scaler is None or not self.is_live(conditions):
            optimizer.step()
            return
        self.scaler.step(optimizer)
        self.scaler.update()
        self._known = None

    def overflowed(self, conditions: Conditions) -> None:
        """What ``scaler.step`` and ``update`` do at an overflow, but for the floor."""
        if self.scaler is None:
            return
        smaller = _fp32(min(self._own(), self.ceiling(conditions)) * self.scaler.get_backoff_factor())
        self._set(max(smaller, self.floor(conditions)), 0)

    def record(self) -> dict[str, Any] | None:
        """JSON-able state; None without a scaler."""
        return None if self.scaler is None else {"scale": self._own(), "tracker": self._tracker()}

    def load(self, record: Mapping[str, Any] | None) -> None:
        """Restore what :meth:`record` gave."""
        if self.scaler is not None and record is not None:
            self._set(float(record["scale"]), int(record["tracker"]))

    def forget(self) -> None:
        """The scaler may have been set by others: its scale is read again."""
        self._known = None

    def _own(self) -> float:
        """The scaler's scale; one host read after each update of it."""
        if self._known is None:
            assert self.scaler is not None
            self._known = float(self.scaler.get_scale())
        return self._known

    def _tracker(self) -> int:
        assert self.scaler is not None
        return int(self.scaler.state_dict()["_growth_tracker"])

    def _set(self, scale: float, tracker: int) -> None:
        assert self.scaler is not None
        self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale, "_growth_tracker": tracker})
        self._known = scale


def _zero_like_a_gradient(optimizer: torch.optim.Optimizer) -> Tensor:
    """A zero, (), where the gradients are."""
    found = next((p for g in optimizer.param_groups for p in g["params"] if p.grad is not None), None)
    return torch.zeros(()) if found is None else torch.zeros((), device=found.device)


def _fp32(value: float) -> float:
    """Rounded as the scaler's own tensor rounds it."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])
