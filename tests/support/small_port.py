"""The trainer's own port around a model of a few numbers: quick to copy, and real in all that is asked of a port."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from finitune.core.types import Reading
from finitune.engine.policy import Action
from finitune.engine.scaler import LossScaler, ScalerSettings
from finitune.models.precision import PRECISIONS
from finitune.train import optim
from finitune.train.compute import Compute
from finitune.train.state import RunState
from finitune.train.step import Parts, TrainPort


class _Steps:
    """A loader without data: the cursor only counts."""

    def advance(self, cursor: Any) -> Any:
        return type(cursor)(cursor.epoch, cursor.step + 1)


def small_port(
    sizes: Sequence[int] = (4, 3, 2), *, name: str = "adamw_torch_fused", dtype: torch.dtype = torch.float32
) -> TrainPort:
    """Linear layers of these sizes; always the same weights."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.to(dtype)
    parameters = tuple(model.named_parameters())
    chosen = optim.OptimSettings(name=name, lr=0.1)
    fields: dict[str, Any] = dict.fromkeys(Parts.__dataclass_fields__)
    compute = Compute(PRECISIONS["fp16-emulated"], torch.device("cpu"))
    fields |= {"model": model, "parameters": parameters, "loader": _Steps(), "probe_every_steps": 0, "context": compute}
    fields |= {"optimizer": optim.build(parameters, chosen), "optim_settings": chosen}
    return TrainPort(Parts(**fields), RunState(scaler=LossScaler(ScalerSettings(growth_interval=3))))


def train(port: TrainPort, steps: int = 1, *, clean: bool = True) -> None:
    """Committed steps; the gradients follow from the step's number."""
    for _ in range(steps):
        generator = torch.Generator().manual_seed(port.state.step)
        for _, parameter in port.parts.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        reading = Reading(port.state.step + 1, loss=1.0 + 1 / (1 + port.state.step), grad_norm=1.0, lr=0.1)
        port.commit(reading)
        port.settle(Action.PROCEED, reading, clean=clean)
