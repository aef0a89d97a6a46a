"""A bare PyTorch loop as a ReplayPort: model, optimizer, loss function, and the batches that the loop hands over.

What a plain loop does is done in the same order with the same calls, so a healthy guarded run has its bits:

    loss / number of micro-batches -> scale -> backward      forward_backward: no state changes
    unscale -> clip -> optimizer.step -> scaler.update       commit
    scheduler.step -> zero_grad(set_to_none=True)

Nothing is seeded. The states of the global generators before each micro-batch are remembered, a step that is computed
again finds them, and afterwards the generators stand where the loop left them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from finitune.adapters import bare_batch
from finitune.adapters.bare_asked import Loop
from finitune.adapters.bare_compute import (
    SideEffects,
    clip_adaptively,
    clip_to,
    loss_of,
    rates_under,
    refuse_sparse,
    set_rate,
)
from finitune.adapters.bare_facts import facts_of, half_max_of
from finitune.adapters.bare_held import Held, HeldBatches, Numbered
from finitune.adapters.bare_look import Looks
from finitune.adapters.bare_training import BareTraining
from finitune.adapters.codes import LOSS_CHANGES_MODEL, QUARANTINED_BATCH
from finitune.core.types import Finding, Reading
from finitune.engine.conditions import NotPossible
from finitune.engine.monitor import Monitor
from finitune.engine.policy import Action, is_scale_overflow
from finitune.engine.port import WHOLE, Ask, Capability, Trace
from finitune.engine.realise import clip_norm, learning_rate
from finitune.engine.scaler import MOST_AT_START, is_search, skipped_before
from finitune.engine.skips import Skips
from finitune.engine.snapshot import is_out_of_memory
from finitune.numerics.norms import tensor_norms
from finitune.numerics.probe import movement, sample
from finitune.numerics.seeds import GeneratorStates

# Outside of fp16 no activation is near a limit: a look now and then is enough.
_LOOK_EVERY_STEPS = 8
_PROBE_EVERY_STEPS = 10


class BarePort(BareTraining):
    """A bare loop as a :class:`finitune.engine.port.ReplayPort`."""

    def __init__(self, loop: Loop, held: HeldBatches, monitor: Monitor | None = None) -> None:
        super().__init__(loop, held)
        self.monitor = monitor
        self.findings: list[Finding] = []
        """Found by the port itself; whoever reads them takes them away."""
        self.looks: Looks | None = None
        """Looks at the first computation, where somebody wants that."""
        self._effects: SideEffects | None = SideEffects(loop.model)
        self.skips = Skips(self)

    def capabilities(self) -> frozenset[Capability]:
        """All; without replay and rollback once the loss function was seen changing the model."""
        without = () if self._effects is not None else (Capability.REPLAY, Capability.ROLLBACK)
        return frozenset(Capability) - frozenset(without)

    @property
    def lr(self) -> float:
        """Learning rate of the step at hand, of the first parameter group."""
        scheduled = float(self.optimizer.param_groups[0]["lr"])
        return learning_rate(scheduled, self.state.updates, self.conditions)

    @property
    def loss_scale(self) -> float | None:
        """What the loss is multiplied by; None where it is not."""
        return self.scaling.scale(self.conditions)

    @property
    def scale_left(self) -> bool:
        """A plain loop does not try a batch again whose gradients overflow; see :meth:`benign_overflow`."""
        return False

    def benign_overflow(self, reading: Reading) -> bool:
        """An overflow of the gradients that a plain loop answers by giving the batch up and halving the scale.

        So a run with a scaler begins, and goes on now and then; not one that overflows again and again.
        """
        scale = reading.loss_scale
        return scale is not None and self.answers_overflow(reading) and is_search(scale, self.state.history)

    def answers_overflow(self, reading: Reading) -> bool:
        """It is an overflow, the scaler has a smaller scale left, and has not come down for very long."""
        left = is_scale_overflow(reading) and self.scaling.left(self.conditions)
        return left and self.state.history.overflows_in_a_row + 1 < MOST_AT_START

    @property
    def max_grad_norm(self) -> float | None:
        """What gradients are clipped to."""
        return clip_norm(self.loop.max_grad_norm, self.conditions)

    @property
    def replayable(self) -> bool:
        """The loss function was not seen changing the model."""
        return self._effects is not None

    def give_up_replay(self) -> None:
        """The loss function is known to change the model."""
        self._effects = None

    # -- a step -----------------------------------------------------------------------------------------------

    @torch.enable_grad()
    def forward_backward(self, ask: Ask = WHOLE) -> Trace:
        """Loss and gradients of the batch at hand, or of what is asked for. Raises NotPossible, and what loss_fn does.

        Where it raises, the state, the gradients and the generators are as before.
        """
        self.abort()
        self._bring(self.state.conditions)
        self._set_rates(self.state.step + 1)
        held = self.held.at(self.state.step + 1 if ask.step is None else ask.step)
        held.check()
        numbered, left_out = self._asked(held, ask)
        if not numbered:
            return self._empty(held, left_out)
        first, before = not held.states, GeneratorStates.now()
        if first:
            held.states.append(before)
        try:
            return self._traced(held, numbered, first=first)
        except BaseException as error:
            self.abort()
            before.restore()
            if first:
                held.states.clear()
            elif isinstance(error, Exception) and not isinstance(error, NotPossible) and not is_out_of_memory(error):
                reason = f"the loss function raised {type(error).__name__} in a replay: {error}"
                raise NotPossible(reason) from error
            raise
        finally:
            if not first:
                self.replayed = True
                before.restore()

    def _set_rates(self, step: int) -> None:
        """Without a scheduler the rates are what the loop had set when the batch of a step came."""
        if self.loop.scheduler is None and step in self.held:
            for group, rate in zip(self.optimizer.param_groups, self.held.at(step).rates, strict=False):
                set_rate(group, rate)

    def _traced(self, held: Held, numbered: Numbered, *, first: bool) -> Trace:
        looking = self.monitor if self._looks() else None
        if looking is not None:
            looking.start()
        self._moving_before = [b.clone() for _, b in self._moving]
        loss = self._without_effects(held, numbered, first=first)
        if self.loss_of_turn is None:
            self.loss_of_turn = loss
        names, ranges_M2 = looking.stop() if looking is not None else ([], None)
        refuse_sparse(self._parameters)
        gradients = [(n, p.grad) for n, p in self._parameters if p.grad is not None]
        norms_P = self._norms_P = tensor_norms([g for _, g in gradients])
        counts = [bare_batch.num_supervised(m) for _, m in numbered]
        # Without labels the number of supervised tokens is not known; the loss is a mean all the same.
        known = sum(c for c in counts if c is not None) if None not in counts else 1
        return Trace(
            step=self.state.step + 1,
            loss_sum=loss * known if known else torch.zeros_like(loss),
            num_supervised=known,
            num_tokens=sum(bare_batch.num_tokens(m) for _, m in numbered),
            norms_P=norms_P,
            parameter_names=[n for n, _ in gradients],
            lr=self.lr,
            loss_scale=self.loss_scale,
            ranges_M2=ranges_M2,
            watch_names=names,
            wide_names=looking.wide if looking is not None else frozenset(),
            half_max=half_max_of(self.realiser, self._parameters, self.conditions),
            rows=self._known_rows(held),
            extras=self._extras(),
        )

    def _without_effects(self, held: Held, numbered: Numbered, *, first: bool) -> Tensor:
        """The computation, with an eye on what it does to the model."""
        effects = self._effects
        if effects is None:
            return self._looked_at(held, numbered, first=first)
        counts, sums = effects.counts(), None if first else effects.sums_once()
        loss = self._looked_at(held, numbered, first=first)
        changed = effects.changed_since(counts) or (effects.differing(sums) if sums is not None else [])
        if changed:
            self._effects = None
            self.findings.append(
                LOSS_CHANGES_MODEL.find(changed[0], step=held.step, name=changed[0], count=len(changed))
            )
        return loss

    def _looked_at(self, held: Held, numbered: Numbered, *, first: bool) -> Tensor:
        """The computation; the first of all is looked at."""
        if self.looks is None or not self.looks.wants_pass:
            return self._computed(held, numbered, first=first)
        loss, found = self.looks.computed(
            lambda: self._computed(held, numbered, first=first), self._parameters, self.loss_scale
        )
        self.findings += found
        return loss

    def _computed(self, held: Held, numbered: Numbered, *, first: bool) -> Tensor:
        """Forward and backward of every micro-batch; the mean of their losses, () fp32."""
        total = None
        for place, (micro, batch) in enumerate(numbered):
            if first:
                if place:
                    held.states.append(GeneratorStates.now())
            elif place == 0 or micro < len(held.states):
                held.states[min(micro, len(held.states) - 1)].restore()
            with self.realiser.forward():
                loss = self._loss(batch, micro)
                part = loss / len(numbered) if len(numbered) > 1 else loss
                self.scaling.scaled(part, self.conditions).backward()  # type: ignore[no-untyped-call]
            value = loss.detach().float()
            total = value if total is None else total + value.to(total.device)
        if first:
            held.after = GeneratorStates.now()
        assert total is not None
        return total / len(numbered) if len(numbered) > 1 else total

    def _loss(self, batch: Any, micro: int) -> Tensor:
        """The loss of one micro-batch, (), with its graph."""
        return loss_of(self.loop.loss_fn(self.model, batch), micro)

    def _empty(self, held: Held, left_out: int) -> Trace:
        """A batch of which every row is in quarantine."""
        self.findings.append(QUARANTINED_BATCH.find(f"step {held.step}", step=held.step, count=left_out))
        device = self._parameters[0][1].device
        return Trace(
            step=self.state.step + 1,
            loss_sum=torch.zeros((), device=device),
            num_supervised=0,
            num_tokens=0,
            norms_P=torch.zeros(0, device=device),
            parameter_names=(),
            lr=self.lr,
            loss_scale=self.loss_scale,
            rows=self._known_rows(held),
            extras=self._extras(),
        )

    def _looks(self) -> bool:
        return self.state.step % _LOOK_EVERY_STEPS == 0 or self.realiser.seen.half == "fp16"

    def _extras(self) -> dict[str, float | None]:
        ratio, changed = self.state.movement if self.state.movement is not None else (None, None)
        return {"update_ratio": ratio, "changed_fraction": changed}

    def commit(self, reading: Reading) -> None:
        """The update, and everything that follows from it."""
        state, weights = self.state, [p for _, p in self._parameters]
        before = sample(weights) if state.updates % _PROBE_EVERY_STEPS == 0 else None
        self._clip(reading)
        with rates_under(self.optimizer, state.updates, self.conditions):
            self.scaling.step(self.optimizer, self.conditions)
        if self.loop.scheduler is not None:
            self.loop.scheduler.step()
        state.movement = movement(before, sample(weights)) if before is not None else None
        state.committed(reading)
        self._moving_before = []
        self.optimizer.zero_grad(set_to_none=True)
        self._drop_gradients()

    def _clip(self, reading: Reading) -> None:
        norms_P, limit, name = self._norms_P, self.max_grad_norm, self.conditions.clipper
        if self.loss_scale is not None:
            self.scaling.unscale(self.optimizer, self.conditions)
            norms_P = None
        if name is not None:
            parameters = [p for _, p in self._parameters]
            self.state.clipper = clip_adaptively(name, self.state.clipper, limit, reading, parameters)
            return
        with_gradient = [p for _, p in self._parameters if p.grad is not None]
        if limit is not None and with_gradient:
            clip_to(with_gradient, norms_P, limit, reading.grad_norm)

    def settle(self, action: Action, reading: Reading, *, clean: bool) -> None:
        """After an abort everything is as it was; what changes here is a decision of its own."""
        state = self.state
        state.attempt += 1
        if action is Action.TREAT:
            return
        state.clean_steps = state.clean_steps + 1 if clean else 0
        if action is not Action.PROCEED:
            self._give_up(reading)
        self.held.judged(state.step, clean=clean and action is Action.PROCEED)

    def _give_up(self, reading: Reading) -> None:
        """The batch is used up without an update. An overflow does to scaler and scheduler what it does in a loop."""
        answered = self.answers_overflow(reading)
        if is_scale_overflow(reading) and self.scaling.left(self.conditions):
            self.scaling.overflowed(self.conditions)
        if answered:
            self.state.history.overflowed()
        else:
            self.state.history.aborted()
        self._schedule_on()
        self.state.step += 1

    def _schedule_on(self) -> None:
        if self.loop.scheduler is None:
            return
        with warnings.catch_warnings():
            # At the start of a run torch warns of a rate that moves before the first update; so it does in any loop.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.loop.scheduler.step()

    # -- what is known of it ------------------------------------------------------------------------------------

    def facts(self) -> Mapping[str, Any]:
        """What the step at hand runs under."""
        rate = {"loss_scale": self.loss_scale, "lr": self.lr, "max_grad_norm": self.max_grad_norm}
        found = facts_of(self.model, self.optimizer, self.realiser, self._parameters, self.conditions)
        try:
            micros = self.batch()
            found |= {"width_tokens": max(map(bare_batch.width, micros), default=0)}
            found |= {"num_units": sum(map(bare_batch.num_rows, micros))}
        except NotPossible:
            found |= {"width_tokens": 0, "num_units": 0}
        return found | rate | skipped_before(self.state.history)

    def close(self) -> None:
        """Take all conditions back and remove every hook."""
        super().close()
        if self.monitor is not None:
            self.monitor.close()
