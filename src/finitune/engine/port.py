"""The seam between the guard and a trainer: a Port does tensor work, the engine decides.

A trainer offers about ten methods; capabilities it lacks are stated, never guessed. Everything the
engine learns of a step passes through a :class:`Trace`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import torch

from finitune.core.types import Reading, RowId
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
    half_max: float | None = None
    """Largest finite number of the compute format; None outside half precision."""
    rows: tuple[RowId, ...] = ()
    extras: Mapping[str, float | None] = field(default_factory=dict)
    """Further fields of the Reading that the port measured on the host."""


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
