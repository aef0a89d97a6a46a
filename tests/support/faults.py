"""Injections: one fault each, at a chosen step of a run in progress."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from finitune.train.step import TrainPort

When = Callable[[], bool]


def at_step(port: TrainPort, *steps: int) -> When:
    """True while one of these (1-based) steps is being computed."""
    return lambda: port.state.step + 1 in steps


def poison_output(module: nn.Module, when: When, value: float = float("nan")) -> Any:
    """One element of the module's output becomes ``value``."""

    def hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor | None:
        if not (when() and torch.is_grad_enabled()):
            return None
        spoilt = output.clone()
        spoilt.view(-1)[0] = value
        return spoilt

    return module.register_forward_hook(hook)


def poison_gradient(parameter: nn.Parameter, when: When, value: float = float("nan")) -> Any:
    """One element of the parameter's gradient becomes ``value``; the loss stays as it is."""

    def hook(gradient: torch.Tensor) -> torch.Tensor | None:
        if not when():
            return None
        spoilt = gradient.clone()
        spoilt.view(-1)[0] = value
        return spoilt

    return parameter.register_hook(hook)


def mask_labels(port: TrainPort, when: When) -> None:
    """Every label of the step's batches becomes -100."""
    loader, real = port.parts.loader, port.parts.loader.at

    def at(cursor: Any) -> Any:
        batches = real(cursor)
        if not when():
            return batches
        return tuple(
            dataclasses.replace(b, labels_BT=torch.full_like(b.labels_BT, -100), num_supervised=0) for b in batches
        )

    loader.at = at
