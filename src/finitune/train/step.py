"""The trainer's side of a step: a ReplayPort over model, optimizer, loader and state.

``forward_backward`` and ``abort`` leave the training state as it was. ``commit`` changes weights, moments,
schedule, scaler, cursor and statistics, all together; ``settle`` carries out what was decided after the
verdict; ``restore`` puts another state in place. ``adopt`` brings other conditions into force.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

from finitune.core.types import Reading, RowId
from finitune.data.collate import Batch, additive_mask
from finitune.data.loader import Cursor, Loader
from finitune.engine.conditions import AS_CONFIGURED, Conditions
from finitune.engine.monitor import Monitor
from finitune.engine.policy import Action, is_scale_overflow
from finitune.engine.port import WHOLE, Ask, Capability, Trace, Unit
from finitune.engine.realise import clip_norm, learning_rate
from finitune.engine.scaler import LossScaler, skipped_before
from finitune.engine.snapshot import copy_over
from finitune.numerics.determinism import Kernels
from finitune.numerics.norms import tensor_norms
from finitune.numerics.probe import movement, sample
from finitune.numerics.seeds import seed_generators
from finitune.train import optim, replay
from finitune.train.adaptive_clip import clip
from finitune.train.compute import Compute
from finitune.train.force import Force, without_islands
from finitune.train.port_facts import facts_of
from finitune.train.schedule import Schedule
from finitune.train.state import RunState, conditions_of
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
    context: Compute
    """Gives the context of a forward and backward."""
    monitor: Monitor | None
    look_every_steps: int
    """The monitor looks at steps 1, 1 + n, ...: always in fp16, now and then where activations cannot overflow."""
    additive_mask: bool
    """Eager attention adds its mask to the scores: packed batches then need numbers instead of booleans."""
    seed: int
    chunk_tokens: int
    probe_every_steps: int
    kernels: Kernels
    origin: Callable[[str], torch.Tensor | None]
    """The value of a weight or buffer in the model that training began from; None where it cannot be had."""


def on_device(parts: Parts, batch: Batch) -> Batch:
    """The batch where the model is, with the kind of mask that its attention takes."""
    moved = batch.to(parts.strategy.device)
    mask = moved.attention_mask
    if mask is None or mask.dim() == _PADDING_DIMENSIONS or not parts.additive_mask:
        return moved
    return replace(moved, attention_mask=additive_mask(mask, next(parts.model.parameters()).dtype))


class TrainPort:
    """Our own trainer as a :class:`finitune.engine.port.ReplayPort`."""

    def __init__(self, parts: Parts, state: RunState) -> None:
        self.parts = parts
        self.state = state
        self.model, self.optimizer = parts.model, parts.optimizer
        self.seen = replay.Seen()
        self._force = Force(parts.model, parts.optimizer, parts.context)
        self._min_scale = state.scaler.settings.min_scale if state.scaler else 0.0
        self._started_s = 0.0

    def capabilities(self) -> frozenset[Capability]:
        """All of them."""
        return frozenset(Capability)

    # -- conditions -------------------------------------------------------------------------------------------

    @property
    def conditions(self) -> Conditions:
        """The conditions in force."""
        return self.state.conditions

    def adopt(self, conditions: Conditions) -> None:
        """Bring conditions into force from the next computation on. Raises NotPossible with nothing changed."""
        self._bring(conditions)
        self.state.conditions = conditions

    def _bring(self, conditions: Conditions) -> None:
        if conditions is self._force.now:
            return
        self._force.bring(conditions)
        if self.state.scaler is not None:
            self._force.set_range(self.state.scaler, self._min_scale, conditions)

    @property
    def lr(self) -> float:
        """Learning rate of the step at hand."""
        scheduled = self.parts.optim_settings.lr * self.parts.schedule(self.state.updates)
        if self.conditions is AS_CONFIGURED:
            return scheduled
        return learning_rate(scheduled, self.state.updates, self.conditions)

    @property
    def scaler(self) -> LossScaler | None:
        """The dynamic loss scaler, where the conditions in force leave it any work."""
        idle = self.conditions.loss_scale is not None or not self.parts.context.precision.uses_scaler
        return None if idle else self.state.scaler

    @property
    def loss_scale(self) -> float | None:
        """What the loss is multiplied by; None where it is not."""
        scaler = self.scaler
        if scaler is None:
            return self.conditions.loss_scale
        return scaler.in_force

    @property
    def scale_left(self) -> bool:
        """A smaller loss scale is left to try for the batch at hand."""
        return self.scaler is not None and not self.scaler.exhausted

    @property
    def max_grad_norm(self) -> float | None:
        """What gradients are clipped to."""
        configured = self.parts.optim_settings.max_grad_norm
        if self.conditions is AS_CONFIGURED:
            return configured
        return clip_norm(configured, self.conditions)

    # -- a step -----------------------------------------------------------------------------------------------

    def forward_backward(self, ask: Ask = WHOLE) -> Trace:
        """Loss and gradients of the batch at the cursor, or of what is asked for. Raises NotPossible."""
        self._started_s = time.perf_counter()
        self._bring(self.state.conditions)
        return self.parts.kernels.compute(partial(self._forward_backward, ask), self.abort)

    def _forward_backward(self, ask: Ask) -> Trace:
        parts, scale = self.parts, self.loss_scale
        step, batches = self._asked(ask)
        num_supervised = parts.strategy.sum_tokens(sum(b.num_supervised for _, b in batches))
        factor = (scale or 1.0) / max(1, num_supervised)
        parts.model.train()
        looking = parts.monitor if self.state.step % parts.look_every_steps == 0 else None
        if looking is not None:
            looking.start()
        loss_sum = self._accumulate(batches, factor, step)
        names, ranges_M2 = looking.stop() if looking is not None else ([], None)
        if self.conditions.fp32_modules:
            names, ranges_M2 = without_islands(names, ranges_M2, self.conditions.fp32_modules)
        gradients = [(n, p.grad) for n, p in parts.parameters if p.grad is not None]
        return Trace(
            step=self.state.step + 1,
            loss_sum=loss_sum,
            num_supervised=num_supervised,
            num_tokens=sum(b.num_tokens for _, b in batches),
            norms_P=tensor_norms([g for _, g in gradients]),
            parameter_names=[n for n, _ in gradients],
            lr=self.lr,
            loss_scale=scale,
            ranges_M2=ranges_M2,
            watch_names=names,
            wide_names=looking.wide if looking is not None else frozenset(),
            half_max=parts.context.precision.half_max,
            rows=tuple(r for _, b in batches for r in b.row_ids),
            extras=self._extras(),
        )

    def _accumulate(self, batches: replay.Numbered, factor: float, step: int) -> torch.Tensor:
        """Forward and backward of every micro-batch, with the randomness of ``step``; the loss sum, () fp32."""
        parts = self.parts
        total = torch.zeros((), device=parts.strategy.device)
        for micro, batch in batches:
            seed_generators(parts.seed, step, micro, parts.strategy.rank)
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
        optim.apply(parts.optimizer, lr=reading.lr, factor=self._clip(reading) / (reading.loss_scale or 1.0))
        self.state.movement = movement(before, sample(weights)) if before is not None else None
        state.history.commit(reading)
        scaler = self.scaler
        if scaler is not None:
            scaler.scale = scaler.in_force
            scaler.committed()
        state.updates += 1
        state.supervised_tokens += reading.supervised_tokens or 0
        state.loss_sum += reading.loss
        self._advance()

    def _clip(self, reading: Reading) -> float:
        """What all gradients are to be multiplied by; one that is clipped by itself is so already."""
        name = self.conditions.clipper
        if name is None:
            return optim.clip_factor(reading.grad_norm, self.max_grad_norm)
        gradients = [p.grad for _, p in self.parts.parameters]
        factor, self.state.clipper = clip(name, self.state.clipper, self.max_grad_norm, reading, gradients)
        return factor

    def abort(self) -> None:
        """Drop the gradients."""
        self.parts.optimizer.zero_grad(set_to_none=True)

    def settle(self, action: Action, reading: Reading, *, clean: bool) -> None:
        """After an abort everything is as it was; what changes here is a decision of its own."""
        state, scaler = self.state, self.scaler
        state.attempt += 1
        if action is Action.TREAT:
            if scaler is not None and scaler.retries:
                # The smaller scales did not help: what does is another cure, at the scale of before.
                scaler.give_up(blame_batch=True)
            return
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
        self.seen.judged(state.step, clean=clean and action is Action.PROCEED)

    def _advance(self) -> None:
        self.state.step += 1
        self.seen.used(self.state.step, self.state.cursor)
        self.state.cursor = self.parts.loader.advance(self.state.cursor)

    def elapsed_s(self) -> float:
        """Seconds since the current step began."""
        return time.perf_counter() - self._started_s

    # -- batches ----------------------------------------------------------------------------------------------

    def _asked(self, ask: Ask) -> tuple[int, replay.Numbered]:
        """The number (from 0) of the step that is asked for, and its micro-batches with theirs."""
        step = self.state.step if ask.step is None else ask.step - 1
        batches: replay.Numbered = list(enumerate(self._at(self._cursor(ask.step))))
        if ask is not WHOLE:
            units = self.units(ask.step) if ask.units is not None else ()
            batches = replay.part_of(batches, ask, units, self._pad_id)
        if self.conditions.extra_padding:
            batches = replay.padded(batches, self.conditions.extra_padding, self._pad_id)
        return step, batches

    def _at(self, cursor: Cursor) -> tuple[Batch, ...]:
        quarantine = self.conditions.quarantine
        loader = self.parts.loader
        return loader.at(cursor, without=quarantine) if quarantine else loader.at(cursor)

    def _cursor(self, step: int | None) -> Cursor:
        """Where the batch of a step is. Raises NotPossible."""
        return self.state.cursor if step in (None, self.state.step + 1) else self.seen.cursor_of(int(step or 0))

    @property
    def _pad_id(self) -> int:
        return self.parts.loader.config.pad_id

    def units(self, step: int | None = None) -> tuple[Unit, ...]:
        """The rows, or packed sequences, of the batch at hand or of another step's. Raises NotPossible."""
        cursor, without = self._cursor(step), self.conditions.quarantine
        return replay.units_of(self.parts.loader.layout(cursor, without=without))

    def clean_steps(self) -> tuple[int, ...]:
        """Earlier steps that were committed without a warning, newest first; none right after a resume."""
        return self.seen.clean_up_to(self.state.step)

    def ahead(self) -> int:
        """The data goes on for ever: epoch follows epoch."""
        return sys.maxsize

    def batch(self, step: int | None = None) -> Sequence[Mapping[str, torch.Tensor]]:
        """The micro-batches as the model gets them: tensors by name. Raises NotPossible."""
        _, batches = self._asked(Ask(step=step))
        return [on_device(self.parts, batch).tensors() for _, batch in batches]

    def rows(self) -> tuple[RowId, ...]:
        """Row ids of the batch at the cursor."""
        return self.parts.loader.peek_rows(self.state.cursor, without=self.conditions.quarantine)

    # -- the state --------------------------------------------------------------------------------------------

    def parameters(self) -> Sequence[tuple[str, nn.Parameter]]:
        """Trainable parameters by name."""
        return self.parts.parameters

    def origin(self, name: str) -> torch.Tensor | None:
        """The value of a weight or buffer in the model that training began from; None where it cannot be had."""
        return self.parts.origin(name)

    def facts(self) -> Mapping[str, Any]:
        """What the step at hand runs under."""
        _, batches = self._asked(WHOLE)
        rate = {"loss_scale": self.loss_scale, "lr": self.lr, "max_grad_norm": self.max_grad_norm}
        widths = [b.ids_BT.shape[1] for _, b in batches]
        return (
            facts_of(self.parts, self.conditions)
            | rate
            | {
                "width_tokens": max(widths, default=0),
                "scale_before": skipped_before(self.state.history)["scale_before"],
                "num_units": len(self.units()),
            }
        )

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
        self.state.check(record)
        was = self._force.now
        self._bring(conditions_of(record))
        try:
            optim.check_moments(self.parts.parameters, moments)
            copy_over({name: tensor for name, tensor in tensors.items() if name in weights}, weights)
        except BaseException:
            self._bring(was)
            raise
        optim.restore_moments(self.parts.optimizer, self.parts.parameters, moments)
        self.state.load(record)
        self.abort()
