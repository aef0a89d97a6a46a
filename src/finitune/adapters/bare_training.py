"""The training state of a bare loop: weights, running statistics, moments, scale, schedule, conditions in force.

It can be copied, put back, saved by the script and taken over in another process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from finitune.adapters.bare_asked import BareBatches, Loop
from finitune.adapters.bare_compute import moving_buffers
from finitune.adapters.bare_held import HeldBatches
from finitune.adapters.bare_origin import Originals
from finitune.adapters.bare_record import BareState, conditions_of
from finitune.adapters.bare_saved import Saved, bad
from finitune.adapters.bare_scale import Scaling
from finitune.adapters.bare_state import OptimizerState, restore_scheduler, scheduler_record, trained
from finitune.engine.conditions import AS_CONFIGURED, Conditions, NotPossible
from finitune.engine.realise import Realiser, check_clipper
from finitune.engine.snapshot import copy_over

_REFRESH_STEPS = 8
"""A module may be given parameters after the start; those that the optimizer does not hold are looked for now and then.
"""


class BareTraining(BareBatches):
    """The part of a bare port that holds the state."""

    def __init__(self, loop: Loop, held: HeldBatches) -> None:
        super().__init__(loop, held)
        self.realiser = Realiser(loop.model, loop.optimizer)
        self.scaling = Scaling(loop.scaler)
        named = trained(loop.model, loop.optimizer)
        self._optimizer_state = OptimizerState(loop.optimizer, named)
        self._parameters = tuple((n, p) for n, p in named if p.requires_grad)
        self._all_parameters = tuple(loop.model.parameters())
        """Whatever may get a gradient, also without being trained."""
        self._moving = moving_buffers(loop.model)
        self._moving_before: list[Tensor] = []
        self._norms_P: Tensor | None = None
        """Of the gradients at hand, the loss scale in them."""
        self._in_force: Conditions = AS_CONFIGURED
        self._dtypes = {name: p.dtype for name, p in self._parameters}
        """That the weights were built in."""
        self._eps = [_number_or_none(group.get("eps")) for group in loop.optimizer.param_groups]
        self.originals: Originals | None = None
        """Copies of what is not trained, where they are kept."""

    # -- conditions -------------------------------------------------------------------------------------------

    def adopt(self, conditions: Conditions) -> None:
        """Bring conditions into force from the next computation on. Raises NotPossible with nothing changed."""
        self._bring(conditions)
        self.state.conditions = AS_CONFIGURED if conditions == AS_CONFIGURED else conditions

    def _bring(self, conditions: Conditions) -> None:
        if conditions == self._in_force:
            return
        check_clipper(conditions)
        self.realiser.adopt(conditions)
        self._in_force = conditions

    # -- gradients --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def abort(self) -> None:
        """Drop the gradients, and put back the running statistics that the forward pass has moved."""
        self._drop_gradients()
        if self._moving_before:
            torch._foreach_copy_([b for _, b in self._moving], self._moving_before)
            self._moving_before = []

    def _drop_gradients(self) -> None:
        """Every gradient, of whatever the optimizer holds now and of the rest of the model."""
        self._norms_P = None
        if self.state.step % _REFRESH_STEPS == 0:  # the walk over all modules costs more than the gradients
            self._all_parameters = tuple(self.model.parameters())
        held = (p for group in self.optimizer.param_groups for p in group["params"])
        for parameter in chain(self._all_parameters, held):
            if parameter.grad is not None:
                parameter.grad = None

    # -- the state --------------------------------------------------------------------------------------------

    def parameters(self) -> Sequence[tuple[str, nn.Parameter]]:
        """Trainable parameters that the optimizer holds, by name."""
        return self._parameters

    def origin(self, name: str) -> Tensor | None:
        """What a weight or buffer that is not trained was when the guard came, where a copy was kept."""
        return None if self.originals is None else self.originals.get(name)

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Trainable weights, running statistics, then everything the optimizer holds."""
        yield from self._parameters
        yield from self._moving
        yield from self._optimizer_state.tensors().items()

    def state_record(self) -> dict[str, Any]:
        """The state that is not tensors."""
        return self.state.record() | {
            "optimizer": self._optimizer_state.record(),
            "scheduler": scheduler_record(self.loop.scheduler),
            "scaler": self.scaling.record(),
        }

    def restore(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """See :class:`finitune.engine.port.Port`. Nothing is changed where the tensors do not fit."""
        own = dict([*self._parameters, *self._moving])
        moments = {name: tensor for name, tensor in tensors.items() if name not in own}
        BareState().load(record)
        was = self._in_force
        self.abort()
        self._bring(conditions_of(record))  # first: they decide what dtype half weights and their moments are in
        try:
            self._optimizer_state.check(moments, record["optimizer"])
            copy_over({name: tensor for name, tensor in tensors.items() if name in own}, own)
        except BaseException:
            self._bring(was)
            raise
        self._optimizer_state.restore(moments, record["optimizer"])
        restore_scheduler(self.loop.scheduler, record["scheduler"])
        self.scaling.load(record["scaler"])
        self.state.load(record)

    def close(self) -> None:
        """Take all conditions back and remove every hook."""
        self.abort()
        self.realiser.close()

    # -- saved and taken over ---------------------------------------------------------------------------------

    def recast(self) -> dict[str, Tensor]:
        """Weights and moments that a condition holds in another dtype than they were built in."""
        other = {name for name, p in self._parameters if p.dtype != self._dtypes[name]}
        return {name: t for name, t in self.state_tensors() if name.partition("|")[0] in other}

    @property
    def eps(self) -> list[float | None]:
        """As configured, by parameter group; None where a group has none, or a pair (Adafactor)."""
        return list(self._eps)

    def take_over(self, saved: Saved) -> None:
        """Go on as the guard whose state this is. Raises UserError SYS430 with nothing changed."""
        groups = self.optimizer.param_groups
        if len(saved.eps) != len(groups):
            raise bad(f"it is of {len(saved.eps)} parameter groups, and the optimizer has {len(groups)}")
        was, configured = self._in_force, self._eps
        self.abort()
        try:
            self._reconfigured(list(saved.eps), saved.conditions)
            self._put(saved.tensors)
        except (NotPossible, KeyError, ValueError) as error:
            self._reconfigured(configured, was)
            raise bad(str(error.args[0] if error.args else error)) from error
        self.state.load(saved.record)
        self.scaling.forget()
        self.realiser.seen.names.update(saved.seen)
        self.held.go_on_after(self.state.step, saved.next_row, saved.batches)

    def _reconfigured(self, eps: list[float | None], conditions: Conditions) -> None:
        """A saved optimizer may have come with the eps of a cure: configured is what was so without it."""
        self._bring(AS_CONFIGURED)
        for group, value in zip(self.optimizer.param_groups, eps, strict=True):
            if value is not None and _number_or_none(group.get("eps")) is not None:
                group["eps"] = value
        self._eps = eps
        self._bring(conditions)

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        held = dict(self.state_tensors())
        missing = sorted(tensors.keys() - held.keys())
        if missing:
            raise KeyError(f"{missing[0]} is not here: load model and optimizer before the guard's state")
        if tensors:
            copy_over(tensors, {name: held[name] for name in tensors})


def _number_or_none(value: Any) -> float | None:
    return value if isinstance(value, float | int) else None
