"""A tiny Llama in a bare port, and faults planted in it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from finitune.core.incident import Suspect, Trigger
from finitune.engine.localise import localise
from finitune.models.tiny import tiny_llama
from support.replay_port import BarePort, lab_of

Context = Callable[[], AbstractContextManager[Any]]


def batches(steps: int = 2, *, rows: int = 4, width: int = 12, micros: int = 1) -> list[list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)

    def one() -> dict[str, torch.Tensor]:
        ids = torch.randint(10, 300, (rows, width), generator=generator)
        return {"input_ids": ids, "labels": ids.clone()}

    return [[one() for _ in range(micros)] for _ in range(steps)]


def llama_port(context: Context = nullcontext, *, layers: int = 2, model: Any = None, **sizes: int) -> BarePort:
    """AdamW on a tiny Llama; the loss is the model's own."""
    model = tiny_llama(0, hidden=32, mlp=64, layers=layers) if model is None else model
    model.train()

    def loss_fn(of: Any, batch: Any) -> torch.Tensor:
        with context():
            loss: torch.Tensor = of(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
        return loss

    return BarePort(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loss_fn, batches(**sizes))


def overflow(port: BarePort, name: str, size: float = 3e4) -> None:
    """The module's weight grows until its fp16 output does not fit, while the weight itself does."""
    weight = port.model.get_submodule(name).weight
    with torch.no_grad():
        weight.fill_(0)
        weight[0] = size  # one channel: the sums of its inputs are far apart
        weight[0, ::2] = -size


def break_backward(module: nn.Module, function: Any) -> Any:
    """A forward hook that passes the module's output through an autograd Function."""

    def hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = function.apply(output)
        return result

    return module.register_forward_hook(hook)


class NanBackward(torch.autograd.Function):
    """The identity; its backward divides 0 by 0 at one place."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        divisor = torch.ones_like(gradient)
        divisor.view(-1)[0] = 0
        return gradient * 0 / divisor


def suspects(port: BarePort, trigger: Trigger = Trigger.LOSS, **kept: Any) -> tuple[Suspect, ...]:
    lab = lab_of(port, trigger, **kept)
    return localise(lab, lab.case)


def of_kind(found: tuple[Suspect, ...], kind: str) -> list[Suspect]:
    return [s for s in found if s.kind == kind]


def names(found: tuple[Suspect, ...], kind: str) -> list[str]:
    return [s.name for s in found if s.kind == kind]
