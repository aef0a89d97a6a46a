"""The trainer's side of a step: a Port over model, optimizer, loader and state.

``forward_backward`` and ``abort`` leave the training state as it was. ``commit`` changes weights, moments,
schedule, scaler, cursor and statistics, all together; ``settle`` carries out what was decided after the
verdict; ``restore`` puts another state in place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import nn

from finitune.core.types import Reading, RowId
from finitune.data.collate import Batch, additive_mask
from finitune.data.loader import Loader
from finitune.engine.monitor import Monitor
from finitune.engine.policy import Action, is_scale_overflow
from finitune.engine.port import Capability, Trace
from finitune.engine.snapshot import copy_over
from finitune.numerics.determinism import Kernels
from finitune.numerics.norms import tensor_norms
from finitune.numerics.probe import movement, sample
from finitune.numerics.seeds import seed_generators
from finitune.train import optim
from finitune.train.schedule import Schedule
from finitune.train.state import RunState
from finitune.train.strategies.single import Strategy

# A padding mask is (B, T); a packed batch carries (B, 1, T, T).
_PADDING_DIMENSIONS = 2


@dataclass(frozen=True, slots=True)
class Parts:
    """What a step is made of; built once a run (``train/prepare.py``)."""

    model: nn.Module
    family: Any
    objective: ModuleType
    parameters: tuple[tuple[str, nn.Parameter], ...]
    optimizer: torch.optim.Optimizer
    optim_settings: optim.OptimSettings
    schedule: Schedule
    loader: Loader
    strategy: Strategy
    context: Callable[[], AbstractContextManager[Any]]
    monitor: Monitor | None
    look_every_steps: int
    """The monitor looks at steps 1, 1 + n, ...: always in fp16, now and then where activations cannot overflow."""
    half_max: float | None
    additive_mask: bool
    """Eager attention adds its mask to the scores: packed batches then need numbers instead of booleans."""
    seed: int
    chunk_tokens: int
    probe_every_steps: int
    kernels: Kernels


def on_device(parts: Parts, batch: Batch) -> Batch:
    """The batch where the model is, with the kind of mask that its attention takes."""
    moved = batch.to(parts.strategy.device)
    mask = moved.attention_mask
    if mask is None or mask.dim() == _PADDING_DIMENSIONS or not parts.additive_mask:
        return moved
    return replace(moved, attention_mask=additive_mask(mask, next(parts.model.parameters()).dtype))


class TrainPort:
    """Our own trainer as a :class:`finitune.engine.port.Port`."""

    def __init__(self, parts: Parts, state: RunState) -> None:
        self.parts = parts
        self.state = state
        self._started_s = 0.0

    def capabilities(self) -> frozenset[Capability]:
        """All of them."""
        return frozenset(Capability)

    @property
    def lr(self) -> float:
        """Learning rate of the step at hand."""
        return self.parts.optim_settings.lr * self.parts.schedule(self.state.updates)

    def forward_backward(self) -> Trace:
        """Loss and gradients of the batch at the cursor."""
        self._started_s = time.perf_counter()
        return self.parts.kernels.compute(self._forward_backward, self.abort)

    def _forward_backward(self) -> Trace:
        parts, scale = self.parts, self.state.scaler.scale if self.state.scaler else None
        batches = parts.loader.at(self.state.cursor)
        num_supervised = parts.strategy.sum_tokens(sum(b.num_supervised for b in batches))
        factor = (scale or 1.0) / max(1, num_supervised)
        parts.model.train()
        looking = parts.monitor if self.state.step % parts.look_every_steps == 0 else None
        if looking is not None:
            looking.start()
        loss_sum = self._accumulate(batches, factor)
        names, ranges_M2 = looking.stop() if looking is not None else ([], None)
        gradients = [(n, p.grad) for n, p in parts.parameters if p.grad is not None]
        return Trace(
            step=self.state.step + 1,
            loss_sum=loss_sum,
            num_supervised=num_supervised,
            num_tokens=sum(b.num_tokens for b in batches),
            norms_P=tensor_norms([g for _, g in gradients]),
            parameter_names=[n for n, _ in gradients],
            lr=self.lr,
            loss_scale=scale,
            ranges_M2=ranges_M2,
            watch_names=names,
            half_max=parts.half_max,
            rows=tuple(r for b in batches for r in b.row_ids),
            extras=self._extras(),
        )

    def _accumulate(self, batches: tuple[Batch, ...], factor: float) -> torch.Tensor:
        """Forward and backward of every micro-batch; the loss sum, () fp32."""
        parts = self.parts
        total = torch.zeros((), device=parts.strategy.device)
        for micro, batch in enumerate(batches):
            seed_generators(parts.seed, self.state.step, micro, parts.strategy.rank)
            with parts.context():
                done = parts.objective.compute(
                    parts.model,
                    parts.family,
                    on_device(parts, batch),
                    factor=factor,
                    chunk_tokens=parts.chunk_tokens,
                )
                if done.scaled is not None:
                    parts.strategy.backward(done.scaled)
            total += done.loss_sum
        return total

    def _extras(self) -> dict[str, float | None]:
        ratio, changed = self.state.movement if self.state.movement is not None else (None, None)
        return {"update_ratio": ratio, "changed_fraction": changed}

    def commit(self, reading: Reading) -> None:
        """The update, and everything that follows from it."""
        parts, state = self.parts, self.state
        due = parts.probe_every_steps > 0 and state.updates % parts.probe_every_steps == 0
        weights = [p for _, p in parts.parameters]
        before = sample(weights) if due else None
        clip = optim.clip_factor(reading.grad_norm, parts.optim_settings.max_grad_norm)
        optim.apply(parts.optimizer, lr=reading.lr, factor=clip / (reading.loss_scale or 1.0))
        self.state.movement = movement(before, sample(weights)) if before is not None else None
        state.history.committed(
            reading.loss,
            reading.grad_norm,
            changed_fraction=reading.changed_fraction,
            headroom_bits=reading.headroom_bits,
        )
        if state.scaler is not None:
            state.scaler.committed()
        state.updates += 1
        state.supervised_tokens += reading.supervised_tokens or 0
        state.loss_sum += reading.loss
        self._advance()

    def abort(self) -> None:
        """Drop the gradients."""
        self.parts.optimizer.zero_grad(set_to_none=True)

    def settle(self, action: Action, reading: Reading, *, clean: bool) -> None:
        """After an abort everything is as it was; what changes here is a decision of its own."""
        state, scaler = self.state, self.state.scaler
        state.attempt += 1
        if action is Action.RETRY_SMALLER_SCALE:
            assert scaler is not None, "only a scaled loss can be tried at a smaller scale"
            scaler.back_off()
            state.history.overflowed()
            return
        state.clean_steps = state.clean_steps + 1 if clean else 0
        if action is not Action.PROCEED:
            if scaler is not None and is_scale_overflow(reading):
                scaler.give_up(blame_batch=state.history.aborts_in_a_row == 0)
            state.history.aborted()
            self._advance()

    def _advance(self) -> None:
        self.state.cursor = self.parts.loader.advance(self.state.cursor)
        self.state.step += 1

    def elapsed_s(self) -> float:
        """Seconds since the current step began."""
        return time.perf_counter() - self._started_s

    def rows(self) -> tuple[RowId, ...]:
        """Row ids of the batch at the cursor."""
        return self.parts.loader.peek_rows(self.state.cursor)

    def state_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Trainable weights, then moments."""
        yield from self.parts.parameters
        yield from optim.moments(self.parts.optimizer, self.parts.parameters)

    def state_record(self) -> dict[str, Any]:
        """The state that is not tensors."""
        return self.state.record()

    def restore(self, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
        """See :class:`finitune.engine.port.Port`. Nothing is changed where the tensors do not fit."""
        weights = dict(self.parts.parameters)
        moments = {name: tensor for name, tensor in tensors.items() if name not in weights}
        optim.check_moments(self.parts.parameters, moments)
        self.state.check(record)
        copy_over({name: tensor for name, tensor in tensors.items() if name in weights}, weights)
        optim.restore_moments(self.parts.optimizer, self.parts.parameters, moments)
        self.state.load(record)
        self.abort()
