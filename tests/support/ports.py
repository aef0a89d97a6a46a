"""Tiny ports of our own trainer, and looks at them that leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from finitune.core.types import Reading
from finitune.engine.monitor import read
from finitune.engine.policy import Action
from finitune.engine.port import Ask
from finitune.engine.snapshot import as_snapshot
from finitune.numerics.digest import digest
from finitune.train.prepare import Prepared
from finitune.train.step import TrainPort
from support.runs import ready
from support.timelines import SMALL

DOWN = "model.layers.0.mlp.down_proj"


def prepared_runs(folder: Path) -> dict[str, Prepared]:
    """One of each kind, with two micro-batches a step."""
    plain = ("data.eval_fraction=0", "gradient_accumulation_steps=2")
    return {
        "padded": ready(folder, *plain, model=SMALL),
        "packed": ready(folder, *plain, "data.packing=true", "data.max_length=64", model=SMALL),
        "half": ready(folder, *plain, "precision=fp16-emulated", model=SMALL),
        "dropout": ready(folder, *plain, "lora={r: 2, lora_dropout: 0.3}", model=SMALL),
        "pure": ready(folder, *plain, "precision=bf16-pure", model=SMALL),
    }


def at_start(port: TrainPort) -> Iterator[TrainPort]:
    """The port, whose state is afterwards as it was."""
    start = as_snapshot(port)
    yield port
    start.restore(port)


def bits(port: TrainPort) -> str:
    return digest(port.state_tensors(), port.state_record())


def look(port: TrainPort, ask: Ask | None = None) -> Reading:
    """One computation; nothing stays of it."""
    before = bits(port)
    try:
        return read(port.forward_backward(ask) if ask is not None else port.forward_backward())
    finally:
        port.abort()
        assert bits(port) == before


def step(port: TrainPort, *, clean: bool = True) -> Reading:
    reading = read(port.forward_backward())
    port.commit(reading)
    port.settle(Action.PROCEED, reading, clean=clean)
    return reading


def grads(port: TrainPort, ask: Ask) -> dict[str, torch.Tensor]:
    port.forward_backward(ask)
    found = {n: p.grad.clone() for n, p in port.parameters() if p.grad is not None}
    port.abort()
    return found
