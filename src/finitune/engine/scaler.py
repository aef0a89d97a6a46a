"""The supervised dynamic loss scaler.

Same rule as ``torch.amp.GradScaler`` (factor 2 down at an overflow, factor 2 up after
``growth_interval`` steps without one; defaults 65536, 2, 0.5, 2000), with what that one lacks: a
floor. There, about 166 overflows in a row drive the scale to 0 and the next healthy batch makes the
weights NaN; here the scale never leaves [min_scale, max_scale].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finitune.core.robust import History

USUAL_SCALE = 2.0**16
"""Where the scalers of torch and DeepSpeed begin."""
LARGEST_START = 2.0**32
"""No framework begins its search above (Megatron-LM's --initial-loss-scale, DeepSpeed's first initial_scale_power)."""
MOST_AT_START = 17
"""From the usual 2**16 so many halvings lead to 1/2: an overflow after that is not the start of a run any more."""
MOST_AFTER_COMMIT = 8
"""Gradients that overflow after seven halvings are over 2**7 times those of the last good step, batch after batch: they
do not vary so much. ``detectors/scale_trajectory`` speaks of a scale that does not settle from there on."""

_FEW = 2
"""Overflows that a spike of the gradients explains, at whatever scale."""


def is_search(scale: float, history: History) -> bool:
    """Whether an overflow at this scale is still a scaler's search, which costs a few batches in any loop.

    At the start of a run it may be long, if it does not begin at an extreme; after a committed step it is short. One
    that comes down to 1 has found nothing: a scale is there to lift small gradients, not to press them down.
    """
    in_a_row = history.overflows_in_a_row + 1
    if not history.num_committed:
        collapsed = scale <= 1.0 and in_a_row > 1
        return in_a_row < MOST_AT_START and scale <= LARGEST_START and not collapsed
    last = history.log2_scale.tail(1)
    fallen_bits = last[0] - math.log2(scale) if last and scale > 0 else math.inf
    if scale <= 1.0 < 2.0 ** min(last, default=0.0) and in_a_row > _FEW:
        return False
    # A scaler that backs off by less than half takes more steps for the same way.
    return in_a_row < MOST_AFTER_COMMIT or (in_a_row < MOST_AT_START and fallen_bits < MOST_AFTER_COMMIT - 1)


def skipped_before(history: History) -> dict[str, Any]:
    """Facts of the batches right before that were given up because their gradients overflowed: how many, and the scale
    of the last good step (None: there was none). What was given up for another reason is not sought back.
    """
    last = history.log2_scale.tail(1)
    num = 0 if history.aborts_in_a_row else history.overflows_in_a_row
    return {"num_skipped": num, "scale_before": 2.0 ** last[0] if last else None}


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
        self.ceiling = math.inf
        """Under a condition in force: no scale above this one is used."""
        self._scale_before_retries = settings.init_scale

    @property
    def in_force(self) -> float:
        """What a loss is multiplied by."""
        return max(min(self.scale, self.ceiling), self.settings.min_scale)

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
        self.scale = max(self.in_force * self.settings.backoff_factor, self.settings.min_scale)
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
        return self.retries >= self.settings.max_retries or self.in_force <= self.settings.min_scale

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
