"""The other contenders of the cure table: what people do without an incident engine.

plain      AdamW, clipping, nothing else
skip       the 4-line guard: clip, and skip the update where loss or norm is not finite
halve      on a loss or norm that is not finite: weights and moments of 10 steps before, half the learning rate for
           good, on with the next batch
HF         ``transformers.Trainer`` with its defaults

All see the batches that ours sees, take the loss from the model itself, and in fp16 scale it by a fixed power of two.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from common import hf_columns, hf_trainer
from cures_faults import Planted
from cures_runs import Setting, bad_tensors, held_out, removed
from finitune.data.collate import Batch
from finitune.numerics.seeds import seed_generators
from finitune.train.prepare import Prepared

BACK_STEPS = 10


@dataclass(frozen=True, slots=True)
class Peer:
    """What a contender was left with."""

    loss: float
    bad: int
    skipped: int = 0
    note: str = ""


@dataclass(slots=True)
class Script:
    """A training loop of the usual kind on a prepared run."""

    prepared: Prepared
    planted: Planted
    factor: float = 1.0
    """What the scheduled learning rate is multiplied by."""
    skipped: int = 0
    states: deque[tuple[dict[str, torch.Tensor], Any]] = field(default_factory=lambda: deque(maxlen=BACK_STEPS))

    @property
    def weights(self) -> list[torch.nn.Parameter]:
        """What is trained."""
        return [p for _, p in self.prepared.port.parts.parameters]

    def run(self, after: Callable[[Script, bool], bool], steps: int) -> Peer:
        """``after(script, finite)``: whether the update is made."""
        port = self.prepared.port
        parts, cursor = port.parts, port.state.cursor
        parts.model.train()
        with removed(self.planted.handles):
            for step in range(steps):
                (batch,) = parts.loader.at(cursor)
                seed_generators(parts.seed, step, 0)
                finite = self._gradients(batch)
                self._update(step, after(self, finite))
                cursor = parts.loader.advance(cursor)
                self.planted.between(step + 1, parts.optimizer)
        return Peer(held_out(self.prepared), bad_tensors(self.prepared), self.skipped)

    def _gradients(self, batch: Batch) -> bool:
        """Loss and clipped gradients; whether loss and norm are finite."""
        parts, recipe = self.prepared.port.parts, self.prepared.recipe
        scale = recipe.scaler.init_scale if parts.context.configured.uses_scaler else 1.0
        with parts.context():
            loss = parts.model(**hf_columns(batch), use_cache=False).loss
            (loss * scale).backward()
        torch._foreach_mul_([p.grad for p in self.weights if p.grad is not None], 1 / scale)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, recipe.max_grad_norm or math.inf)
        return math.isfinite(float(loss)) and math.isfinite(float(norm))

    def _update(self, step: int, wanted: bool) -> None:
        parts, recipe = self.prepared.port.parts, self.prepared.recipe
        for group in parts.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * parts.schedule(step) * self.factor
        if wanted:
            parts.optimizer.step()
        else:
            self.skipped += 1
        parts.optimizer.zero_grad()

    def keep(self) -> None:
        """Remember the state for a rollback."""
        weights = {n: p.detach().clone() for n, p in self.prepared.port.parts.parameters}
        self.states.append((weights, copy.deepcopy(self.prepared.port.parts.optimizer.state_dict())))

    def go_back(self) -> None:
        """To the oldest state that is remembered: 10 steps before, fewer right after another rollback."""
        if not self.states:
            return
        weights, optimizer = self.states[0]
        self.states.clear()
        with torch.no_grad():
            for name, parameter in self.prepared.port.parts.parameters:
                parameter.copy_(weights[name])
        self.prepared.port.parts.optimizer.load_state_dict(copy.deepcopy(optimizer))
        self.states.append((weights, optimizer))


def always(_script: Script, _finite: bool) -> bool:
    """The plain loop."""
    return True


def if_finite(_script: Script, finite: bool) -> bool:
    """The 4-line guard."""
    return finite


def back_and_halve(script: Script, finite: bool) -> bool:
    """Roll back and halve the learning rate, whatever the cause."""
    if finite:
        script.keep()
        return True
    script.go_back()
    script.factor /= 2
    return False


SCRIPTS: dict[str, Callable[[Script, bool], bool]] = {
    "plain": always,
    "skip": if_finite,
    "halve": back_and_halve,
}


def script(setting: Setting, name: str) -> Peer:
    """One of the loops with the fault in it."""
    prepared, planted = setting.prepared(name)
    return Script(prepared, planted).run(SCRIPTS[name], prepared.plan.total_steps)


def hf(setting: Setting) -> Peer:
    """The HF Trainer with its defaults."""
    from transformers import TrainerCallback

    if setting.fault.hf:
        return Peer(math.nan, 0, note=setting.fault.hf)
    prepared, planted = setting.prepared("hf")
    parts, recipe, steps = prepared.port.parts, prepared.recipe, prepared.plan.total_steps
    warmup = {"warmup_steps": recipe.warmup_steps} if recipe.warmup_steps else {}

    class Between(TrainerCallback):
        """State faults come after a step."""

        def on_step_end(self, _args: Any, state: Any, _control: Any, **given: Any) -> None:
            planted.between(state.global_step, given["optimizer"])

    trainer = hf_trainer(
        parts.model,
        _batches(prepared, steps),
        setting.home / "hf-trainer",
        callbacks=[Between()],
        max_steps=steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_scheduler_type,
        save_strategy="no",
        **warmup,
    )
    with removed(planted.handles):
        trainer.train()
    return Peer(held_out(prepared), bad_tensors(prepared))


def _batches(prepared: Prepared, steps: int) -> list[Batch]:
    loader, cursor, batches = prepared.port.parts.loader, prepared.port.state.cursor, []
    for _ in range(steps):
        batches += loader.at(cursor)
        cursor = loader.advance(cursor)
    return batches
