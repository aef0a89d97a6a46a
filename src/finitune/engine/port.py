"""The seam between the guard and a trainer: a Port does tensor work, the engine decides.

A trainer offers about ten methods; capabilities it lacks are stated, never guessed. Everything the
engine learns of a step passes through a :class:`Trace`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import torch
from torch import nn

from finitune.core.robust import History
from finitune.core.types import Reading, RowId
from finitune.engine.conditions import Conditions
from finitune.engine.policy import Action


class Capability(str, Enum):
    """What a port can do for the guard."""

    VETO = "veto"
    SKIP_BATCH = "skip_batch"
    REPLAY = "replay"
    ROLLBACK = "rollback"


@dataclass(slots=True)
class Trace:
    """Tensors of one step, after backward and before clipping; still on their device.

    Shapes: loss_sum () fp32, norms_P (P,) fp32 over ``parameter_names``, ranges_M2 (M, 2) fp32 over
    ``watch_names`` (least and greatest value seen).
    """

    step: int
    loss_sum: torch.Tensor
    """Sum of the loss over all supervised tokens, without loss scale."""
    num_supervised: int
    num_tokens: int
    norms_P: torch.Tensor
    """L2 norm of each gradient, loss scale still in it."""
    parameter_names: Sequence[str]
    lr: float
    loss_scale: float | None = None
    ranges_M2: torch.Tensor | None = None
    watch_names: Sequence[str] = ()
    wide_names: Set[str] = frozenset()
    """Those of ``watch_names`` that are not half precision: the residual stream under autocast is fp32."""
    half_max: float | None = None
    """Largest finite number of the compute format; None outside half precision."""
    rows: tuple[RowId, ...] = ()
    extras: Mapping[str, float | None] = field(default_factory=dict)
    """Further fields of the Reading that the port measured on the host."""


@dataclass(frozen=True, slots=True)
class Unit:
    """The smallest part of a batch that can be computed without the rest: a row, or a pack of rows."""

    micro: int
    """Micro-batch of the step."""
    index: int
    """Place along the first dimension of the micro-batch's tensors."""
    rows: tuple[RowId, ...]
    """Its rows; more than one in a packed sequence."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Which batch a forward and backward is to use; by default all of the batch at hand."""

    step: int | None = None
    """The batch of another step (1-based, as in a Reading), under the present state."""
    units: tuple[int, ...] | None = None
    """Only these units of :meth:`ReplayPort.units`. The other places of their micro-batches hold copies of them, so
    that shapes, padding width and kernels stay; micro-batches without any of them are left out."""
    prefix_tokens: int | None = None
    """Only the first tokens of each row carry their content; the width stays. For causal models."""


WHOLE = Ask()


class Port(Protocol):
    """What a trainer offers. Only ``commit``, ``settle`` and ``restore`` may change the training state."""

    def capabilities(self) -> frozenset[Capability]:
        """Which of the guard's actions this trainer supports."""
        ...

    def forward_backward(self) -> Trace:
        """Compute the current batch's loss and gradients; the training state stays as it is."""
        ...

    def commit(self, reading: Reading) -> None:
        """Clip, update weights and moments, advance schedule, scaler and cursor."""
        ...

    def abort(self) -> None:
        """Drop the gradients: everything is bit for bit as before ``forward_backward``."""
        ...

    def settle(self, action: Action, reading: Reading, *, clean: bool) -> None:
        """Carry out what was decided after the verdict: retry at a smaller scale, or move past the batch.

        Called once for every transaction. ``clean``: it was committed and nothing worth a warning was found.
        """
        ...

    def state_tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Every tensor of the training state by name: trainable weights and moments."""
        ...

    def state_record(self) -> dict[str, Any]:
        """The rest of the training state, JSON-able: scaler, schedule, cursor, statistics.

        Its ``"step"`` counts batches used up, its ``"attempt"`` transactions; both of the line that led here.
        """
        ...

    def restore(self, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
        """Make ``tensors`` and ``record`` the training state, bit for bit; gradients are dropped.

        A moment that is not among the tensors did not exist yet and is removed. Raises KeyError for a tensor that
        this model does not have or lacks, ValueError for another shape or dtype.
        """
        ...


class PortState(Protocol):
    """The part of a port's state that the guard reads and writes."""

    step: int
    """Batches used up."""
    attempt: int
    """Transactions made."""
    updates: int
    """Committed steps."""
    history: History
    guard: dict[str, Any]
    """What the guard remembers, JSON-able: part of the training state."""


class ReplayPort(Port, Protocol):
    """A port with :attr:`Capability.REPLAY`: the step at hand can be computed again, also under other conditions.

    ``conditions`` are part of the training state: ``state_record()["conditions"]`` is their JSON, and ``restore``
    brings back those of the record.
    """

    @property
    def state(self) -> PortState:
        """Counters, statistics, and what the guard remembers."""
        ...

    @property
    def scale_left(self) -> bool:
        """There is a scaler with a smaller scale to try for the batch at hand; False where the port skips at once."""
        ...

    @property
    def loss_scale(self) -> float | None:
        """The present loss scale; None where there is no scaler."""
        ...

    @property
    def conditions(self) -> Conditions:
        """The conditions in force."""
        ...

    def ahead(self) -> int:
        """How many batches after the one at hand can be computed now."""
        ...

    @property
    def model(self) -> nn.Module:
        """The model as it is called; its module names are those of suspects and ``fp32_modules``."""
        ...

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer; only the port steps it."""
        ...

    def adopt(self, conditions: Conditions) -> None:
        """Bring conditions into force from the next computation on. Raises NotPossible with nothing changed."""
        ...

    def forward_backward(self, ask: Ask = WHOLE) -> Trace:
        """As :meth:`Port.forward_backward`, for the batch that is asked for. The randomness is that of its step.

        Raises NotPossible where this batch or part cannot be had.
        """
        ...

    def units(self, step: int | None = None) -> tuple[Unit, ...]:
        """The parts of the batch at hand, or of another step's. Raises NotPossible."""
        ...

    def clean_steps(self) -> tuple[int, ...]:
        """Earlier steps that were committed without a warning and whose batches can be computed again; newest first."""
        ...

    def batch(self, step: int | None = None) -> Sequence[Any]:
        """The micro-batches (nests of tensors) as the model gets them; for capture. Raises NotPossible."""
        ...

    def parameters(self) -> Sequence[tuple[str, nn.Parameter]]:
        """Trainable parameters with their names in ``model``."""
        ...

    def origin(self, name: str) -> torch.Tensor | None:
        """The value that a weight or buffer had in the model that training began from, where it can still be had."""
        ...

    def facts(self) -> Mapping[str, Any]:
        """What the step runs under, JSON-able: precision ("fp32", "fp16", "bf16", "fp16-emulated", ...), half_max,
        weights (dtypes of the trainable weights), loss_scale, lr, optimizer, adam_eps, betas, weight_decay,
        max_grad_norm, attention, device, width_tokens, num_units, versions, dropout.
        """
        ...
