"""Failures to experiment on: each recipe trains a tiny model until a step fails, and gives the lab at that step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import nn

from engine.experiments.port import VOCAB, HalfPort, causal_loss, llama, text
from finitune.core.incident import Suspect, Trigger, Verdict
from finitune.core.types import Finding, Severity
from finitune.engine.case import Case
from finitune.engine.lab import Budget, Lab
from finitune.engine.monitor import read
from finitune.engine.policy import Action
from finitune.engine.snapshot import Snapshot, as_snapshot
from finitune.models.tiny import tiny_llama
from finitune.numerics.statecheck import bad_tensors

MAX_REPLAYS = 60.0


def overflow(lr: float = 0.1) -> Lab:
    """A and A2: fp16 products; AdamW makes a down_proj grow beyond 65504. fp32 would go on for ever."""
    model = tiny_llama(0, hidden=64, layers=2, heads=4, kv_heads=2, mlp=192, vocab=VOCAB, positions=64).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    return until_failure(HalfPort(model, optimizer, causal_loss, text(60, width=32), half=True))


def rate_too_high() -> Lab:
    """B: fp32 SGD whose loss runs away until it is NaN."""
    model = llama()
    return until_failure(
        HalfPort(model, torch.optim.SGD(model.parameters(), lr=3.0, momentum=0.9), causal_loss, text(40))
    )


def bad_row_of_weights(at: int = 13) -> Lab:
    """C: pure fp16; the embedding of a token that is rare is inf, one row of one batch has it."""
    model, batches = llama().half(), text(20)
    with torch.no_grad():
        model.get_submodule("model.embed_tokens").weight[VOCAB - 1] = math.inf  # type: ignore[union-attr, operator, index]
    batches[at - 1][0]["input_ids"][2, 5] = VOCAB - 1
    return until_failure(HalfPort(model, torch.optim.SGD(model.parameters(), lr=0.01), causal_loss, batches))


def nothing_supervised(at: int = 12) -> Lab:
    """C2: in one batch no label counts; the loss is NaN, every gradient is 0."""
    model, batches = llama(), text(20)
    batches[at - 1][0]["labels"].fill_(-100)
    return until_failure(HalfPort(model, torch.optim.AdamW(model.parameters(), lr=1e-3), causal_loss, batches))


def infinite_derivative(at: int = 15) -> Lab:
    """D2: an auxiliary sqrt(sum of squares) over a span that is empty in one row: finite loss, NaN gradient."""
    model, batches = llama(), text(20)
    for number, (batch,) in enumerate(batches, start=1):
        batch["span"] = torch.ones(len(batch["labels"]), batch["labels"].shape[1])
        if number == at:
            batch["span"][1] = 0

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        out = model(input_ids=batch["input_ids"], labels=batch["labels"], output_hidden_states=True)
        hidden_BTC = out.hidden_states[-1] * batch["span"].unsqueeze(-1)
        total: torch.Tensor = out.loss + 1e-3 * hidden_BTC.pow(2).sum(dim=(1, 2)).sqrt().mean()
        return total

    return until_failure(HalfPort(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loss, batches))


def half_optimizer(*, caught: bool = True) -> Lab:
    """E: pure fp16 under AdamW with an eps that fp16 cannot hold. ``caught``: the update is undone at once."""
    model = llama().half()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False, fused=False)
    return until_failure(HalfPort(model, optimizer, causal_loss, text(20)), check_updates=caught)


def exploding_gradient() -> Lab:
    """D: fp32 SGD, sound but for one batch whose gradient is enormous."""
    model, batches = llama(), text(30)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        result: torch.Tensor = causal_loss(model, batch) * batch["weight"].mean()
        return result

    for number, (batch,) in enumerate(batches, start=1):
        batch["weight"] = torch.full((len(batch["labels"]),), 1e4 if number == 12 else 1.0)
    return until_failure(HalfPort(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), loss, batches))


RECIPES: dict[str, Callable[[], Lab]] = {
    "A": overflow,
    "A2": lambda: overflow(0.2),
    "B": rate_too_high,
    "C": bad_row_of_weights,
    "C2": nothing_supervised,
    "D2": infinite_derivative,
    "E": lambda: half_optimizer(caught=False),
}


def until_failure(port: HalfPort, max_steps: int = 60, *, check_updates: bool = False) -> Lab:
    """Train until a step fails, keeping every state."""
    states: dict[int, Snapshot] = {0: as_snapshot(port)}
    losses: list[float] = []
    norms: list[float] = []
    while port.state.step < max_steps:
        reading = read(port.forward_backward())
        if not (math.isfinite(reading.loss) and math.isfinite(reading.grad_norm)):
            port.abort()
            return lab_at(port, failure_of(reading), reading, states, losses, norms)
        port.commit(reading)
        if check_updates and bad_tensors(port.state_tensors()):
            states[port.state.step].restore(port)
            return lab_at(port, Trigger.UPDATE, reading, states, losses, norms)
        port.settle(Action.PROCEED, reading, clean=True)
        losses.append(reading.loss)
        norms.append(reading.grad_norm)
        states[port.state.step] = as_snapshot(port)
    raise AssertionError("nothing failed")


def failure_of(reading: Any) -> Trigger:
    return Trigger.GRADIENT if math.isfinite(reading.loss) else Trigger.LOSS


def lab_at(
    port: HalfPort,
    trigger: Trigger,
    reading: Any,
    states: dict[int, Snapshot],
    losses: list[float],
    norms: list[float],
    *suspects: Suspect,
    **data: Any,
) -> Lab:
    """The lab at the step at hand."""
    past = {
        "steps": port.state.step,
        "recent_losses": losses,
        "median_loss": median(losses) if losses else None,
        "median_grad_norm": median(norms) if norms else None,
        "first_loss": losses[0] if losses else None,
    }
    reading = replace(reading, supervised_tokens=None)
    case = Case(trigger, Finding("NUM001", Severity.ERROR, data=data), reading, port.facts(), past)
    case = replace(case, verdict=Verdict.REPRODUCED, suspects=suspects)
    port.asked.clear()
    return Lab(port, case, as_snapshot(port), Budget(MAX_REPLAYS, 1e9), states.get)
