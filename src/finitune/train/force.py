"""Conditions brought into force on our own trainer: precision, islands, attention, eps; and the floor of the scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from finitune.engine.conditions import AS_CONFIGURED, Conditions
from finitune.engine.realise import Realiser, check_clipper
from finitune.engine.scaler import LossScaler
from finitune.train.compute import Compute


@dataclass(slots=True)
class Force:
    """What is in force, and how it got there. Learning rate, clipping and data are the port's own matter."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    compute: Compute
    now: Conditions = AS_CONFIGURED
    _realiser: Realiser | None = field(default=None, init=False)

    def bring(self, conditions: Conditions) -> None:
        """Bring conditions into force. Raises NotPossible with nothing changed."""
        if conditions == self.now:
            return
        precision = self.compute.named(conditions.precision)
        check_clipper(conditions)
        self._realise(conditions, cast=self.compute.half_weights and precision is not self.compute.configured)
        self.compute.precision = precision
        self.now = conditions

    def _realise(self, conditions: Conditions, *, cast: bool) -> None:
        """What the engine knows how to do. The precision of products is the context's; that of weights is not."""
        inner = replace(
            AS_CONFIGURED,
            precision=conditions.precision if cast else None,
            fp32_modules=conditions.fp32_modules,
            attention=conditions.attention,
            adam_eps=conditions.adam_eps,
        )
        if self._realiser is None:
            if inner == AS_CONFIGURED:
                return
            self._realiser = Realiser(self.model, self.optimizer)
        self._realiser.adopt(inner)
        self.compute.inside = self._realiser.forward if inner != AS_CONFIGURED else None

    def set_range(self, scaler: LossScaler, configured_min: float, conditions: Conditions) -> None:
        """The least scale that the scaler goes down to, and the largest that is used."""
        scaler.ceiling = math.inf if conditions.max_scale is None else conditions.max_scale
        floor = configured_min if conditions.min_scale is None else conditions.min_scale
        if scaler.settings.min_scale != floor:
            scaler.settings = replace(scaler.settings, min_scale=min(floor, scaler.settings.max_scale))


def without_islands(
    names: Sequence[str], ranges_M2: torch.Tensor | None, islands: tuple[str, ...]
) -> tuple[list[str], torch.Tensor | None]:
    """What the monitor saw outside of the islands of fp32: inside of them no limit of half precision is near."""
    kept = [i for i, name in enumerate(names) if not _inside(name, islands)]
    if ranges_M2 is None or not kept:
        return [], None
    return [names[i] for i in kept], ranges_M2[kept]


def _inside(name: str, islands: tuple[str, ...]) -> bool:
    module = name.removesuffix(".input")
    return any(module == island or module.startswith(f"{island}.") for island in islands)
