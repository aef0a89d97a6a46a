"""A training loop in parts, healthy until a fault is planted in it.

A run (``bench/runs``) builds a Workload, a fault (``bench/faults``) changes it, a contender (``bench/contenders``)
trains on it. What a fault does hangs on content (a row, a token, a width, a value), never on how often it is called,
unless it is meant to be one that does not repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from finitune.numerics.half import emulated_half

Batch = dict[str, Any]
LossFn = Callable[[Any, Any], Tensor]
Extra = Callable[[Any, Batch], Tensor]
"""A further loss: (model, batch) -> scalar tensor, added to the run's own."""
PRECISIONS = ("fp32", "bf16", "fp16")


def no_factor(_updates: int) -> float:
    """The learning rate as it was set."""
    return 1.0


@dataclass(slots=True)
class Workload:
    """Everything a training script has."""

    run: str
    """Registered name of the run."""
    precision: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: LossFn
    """Mean loss of one batch, without any precision context."""
    batches: list[Any]
    """One entry a step: a nest of tensors, or a list of such micro-batches. Rows are the first dimension."""
    rows: list[list[str]]
    """By step, the names of its rows."""
    held_out: list[Any]
    """Batches that are never trained on."""
    decoder: str = "model"
    """The submodule that is called with ``input_ids`` or ``inputs_embeds``; its ``layers`` are the decoder's."""
    pad_id: int = 0
    max_grad_norm: float | None = 1.0
    init_scale: float = 2.0**10
    """Of the loss scaler in fp16."""
    rate: Callable[[int], float] = no_factor
    """What the learning rate is multiplied by, by the number of updates made."""
    extras: list[Extra] = field(default_factory=list)
    after: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    spoilt: frozenset[str] = frozenset()
    """State tensors that the fault itself made non-finite before the first step."""
    step: int = 0
    """Steps begun: 1 while the first batch is handed over. Kept by the contender's Witness."""
    key: str = ""
    """Of the case that it was built for."""
    guard_options: dict[str, Any] = field(default_factory=dict)
    """More keyword arguments of ``finitune.guard`` (split_rows and the like)."""

    # -- what a fault may do -----------------------------------------------------------------------------------

    def between(self, step: int, act: Callable[[], None]) -> None:
        """``act`` once, right after the batch of a step (from 1) was used up."""
        self.after.setdefault(step, []).append(act)

    def parameter(self, name: str) -> nn.Parameter:
        """A parameter by its dotted name."""
        return dict(self.model.named_parameters())[name]

    def weight(self, module: str) -> Tensor:
        """The weight of a module, to be written to."""
        tensor: Tensor = self.model.get_submodule(module).weight.data  # type: ignore[assignment]
        return tensor

    @property
    def layers(self) -> list[str]:
        """Dotted names of the decoder layers."""
        return [f"{self.decoder}.layers.{i}" for i in range(len(self.model.get_submodule(f"{self.decoder}.layers")))]  # type: ignore[arg-type]

    def projections(self, *parts: str) -> list[str]:
        """Dotted names of linear layers inside the decoder layers whose names end with one of ``parts``."""
        inside = f"{self.decoder}.layers."
        named = [n for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and n.startswith(inside)]
        return [n for n in named if n.endswith(parts)] if parts else named

    def micros(self, step: int) -> list[Batch]:
        """The micro-batches of a step (from 1)."""
        batch = self.batches[step - 1]
        return batch if isinstance(batch, list) else [batch]

    def row_ids(self, step: int) -> list[Tensor]:
        """Token ids of the rows of a step, without padding."""
        out = []
        for batch in self.micros(step):
            mask = batch.get("attention_mask")
            for place, ids in enumerate(batch["input_ids"]):
                out.append(ids if mask is None else ids[mask[place].bool()])
        return out

    def has(self, ids_BT: Tensor, *rows: Tensor) -> Tensor:
        """Which rows of a batch are one of these, (B,) bool; padding counts for nothing."""
        return are_among(ids_BT, rows, self.pad_id)

    def decoder_inputs(self, change: Callable[[dict[str, Any]], None]) -> None:
        """``change(kwargs)`` edits what the decoder is called with, ``input_ids`` among it."""
        edit_inputs(self.model.get_submodule(self.decoder), change)

    def spoil(self) -> None:
        """Note which tensors are non-finite now: the fault's own work before the first step."""
        named = (*self.model.named_parameters(), *self.model.named_buffers())
        self.spoilt = frozenset(n for n, t in named if t.is_floating_point() and not bool(t.isfinite().all()))

    def place(self, random: Random, early: float = 0.25, late: float = 0.6) -> tuple[int, int]:
        """A step (from 1) in a part of the run, and the number of a row in it."""
        count = len(self.batches)
        step = random.randint(max(2, int(early * count)), max(3, int(late * count)))
        return step, random.randrange(len(self.rows[step - 1]))

    # -- what a contender needs --------------------------------------------------------------------------------

    def context(self) -> AbstractContextManager[Any]:
        """The precision of the forward pass: autocast in bf16, emulated autocast in fp16 (same roundings and range)."""
        if self.precision == "bf16":
            return torch.autocast("cpu", torch.bfloat16)
        return emulated_half(torch.float16) if self.precision == "fp16" else nullcontext()

    def compute(self, model: Any, batch: Any) -> Tensor:
        """``loss_fn`` of the script: the loss of one micro-batch, with whatever a fault adds to it."""
        with self.context():
            loss = self.loss(model, batch)
            for extra in self.extras:
                loss = loss + extra(model, batch)
        return loss

    def scheduler(self) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule: constant but for ``rate``."""
        return torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda updates: self.rate(updates))

    def scaler(self) -> torch.amp.GradScaler | None:
        """A loss scaler in fp16."""
        return torch.amp.GradScaler("cpu", init_scale=self.init_scale) if self.precision == "fp16" else None

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Weights, buffers and optimizer moments by name."""
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()
        names: dict[Any, str] = {p: n for n, p in self.model.named_parameters()}
        for parameter, slots in self.optimizer.state.items():
            for slot, value in slots.items():
                if isinstance(value, Tensor):
                    yield f"{names.get(parameter, '?')}|{slot}", value

    def held_out_loss(self) -> float:
        """Mean loss of the held-out batches in fp32, with the weights as they are, in eval mode."""
        was = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                losses = [float(self.loss(self.model, batch)) for batch in self.held_out]
        finally:
            self.model.train(was)
        return sum(losses) / len(losses)


@dataclass(frozen=True, slots=True)
class Expected:
    """The right answers for one planted fault."""

    says: str
    """One sentence with what was drawn."""
    step: int
    """The step (from 1) at which it takes effect; 0: before the first."""
    codes: tuple[str, ...]
    """Any of these is right for "why"."""
    places: tuple[tuple[str, str], ...] = ()
    """(kind, name): any of these, named as a suspect or as the place of the cause, is right for "where"; empty: not
    scored. A name counts if it is equal or ends with the expected one."""
    remedies: tuple[str, ...] = ()
    """Any of these is right for "what to do"; "none": to be left alone; "halt": no safe way on. Empty: not scored."""
    never: tuple[str, ...] = ()
    """Beginnings of codes that are wrong to name, besides whatever is not right."""
    reference: str = "clean"
    """What the final loss is measured against: "clean", the run without the fault; "fp32", the faulty run in fp32;
    "": not curable, the loss is not scored."""
    data: dict[str, Any] = field(default_factory=dict)
    """What was drawn."""


def are_among(ids_BT: Tensor, rows: Sequence[Tensor], pad_id: int) -> Tensor:
    """Which rows of a batch are one of these (token ids without padding), (B,) bool; padding counts for nothing."""
    found_B = torch.zeros(ids_BT.shape[0], dtype=torch.bool)
    for row in rows:
        if row.numel() <= ids_BT.shape[1]:
            same_B = (ids_BT[:, : row.numel()] == row).all(1)
            found_B |= same_B & (ids_BT[:, row.numel() :] == pad_id).all(1)
    return found_B


def edit_inputs(decoder: nn.Module, change: Callable[[dict[str, Any]], None]) -> None:
    """From now on ``change(kwargs)`` edits what a decoder is called with, ``input_ids`` among it."""

    def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        named = dict(zip(("input_ids", "attention_mask", "position_ids"), args, strict=False)) | kwargs
        change(named)
        return (), named

    decoder.register_forward_pre_hook(hook, with_kwargs=True)


def sequence(items: Any) -> Sequence[Any]:
    """Micro-batches of a step: a list as it is, anything else alone."""
    return items if isinstance(items, list) else [items]
