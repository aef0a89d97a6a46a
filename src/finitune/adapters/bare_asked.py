"""The batches of a bare loop as its port sees them: the one at hand, what is asked for of it, those of before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finitune.adapters.bare_facts import pad_id_of
from finitune.adapters.bare_held import Held, HeldBatches, Numbered
from finitune.adapters.bare_record import BareState
from finitune.core.types import RowId
from finitune.engine.conditions import Conditions
from finitune.engine.port import WHOLE, Ask, Unit
from finitune.engine.realise import widen_batch

LossFn = Callable[[Any, Any], Any]
"""``loss_fn(model, batch)``: a scalar tensor, or an object with ``.loss``."""


@dataclass(frozen=True, slots=True)
class Loop:
    """What a bare loop is made of."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: LossFn
    scheduler: Any = None
    scaler: torch.amp.GradScaler | None = None
    max_grad_norm: float | None = None


class BareBatches:
    """The part of a bare port that deals with batches."""

    def __init__(self, loop: Loop, held: HeldBatches) -> None:
        self.loop, self.held = loop, held
        self.model, self.optimizer = loop.model, loop.optimizer
        self.state = BareState()
        self.loss_of_turn: Tensor | None = None
        """Mean loss of the first computation since :meth:`begin_turn`, (), exact."""
        self.replayed = False
        """A step was computed again since the newest batch came: generators are put right at the end."""

    @property
    def conditions(self) -> Conditions:
        """The conditions in force."""
        return self.state.conditions

    # -- batches ----------------------------------------------------------------------------------------------

    @property
    def newest_step(self) -> int:
        """Step of the newest batch that the loop has handed over."""
        return self.held.newest

    def push(self, batch: Any) -> None:
        """The loop's next batch; it comes up after those that are not used up yet."""
        held = self.held.push(batch)
        rates = (group["lr"] for group in self.optimizer.param_groups)
        held.rates = tuple(r.detach().clone() if isinstance(r, Tensor) else r for r in rates)
        self.replayed = False

    @property
    def oldest_step(self) -> int:
        """The first step whose batch is still held."""
        return self.held.oldest

    def begin_turn(self) -> None:
        """A transaction begins."""
        self.loss_of_turn = None

    def withdraw(self) -> None:
        """The newest batch never came: its loss could not be computed."""
        self.held.withdraw()

    def generators_on(self) -> None:
        """Put the global generators where the loop's own computation of the newest batch left them."""
        if self.replayed and self.newest_step in self.held:
            after = self.held.at(self.newest_step).after
            if after is not None:
                after.restore()

    def ahead(self) -> int:
        """Batches after the one at hand: some are there only while a run catches up after going back."""
        return max(0, self.newest_step - self.state.step - 1)

    @property
    def _quarantine(self) -> frozenset[str]:
        return frozenset(self.conditions.quarantine)

    def _asked(self, held: Held, ask: Ask) -> tuple[Numbered, int]:
        """The micro-batches that are asked for with their numbers, and how many rows are in quarantine."""
        numbered, left_out = self.held.micros(held, self._quarantine)
        if ask is not WHOLE and numbered:
            units = self.held.units(held, self._quarantine) if ask.units is not None else ()
            numbered = self.held.part(numbered, ask, units)
        extra = self.conditions.extra_padding
        if extra:
            pad_id = pad_id_of(self.model)
            numbered = [(n, widen_batch(m, extra, pad_id=pad_id)) for n, m in numbered]
        return numbered, left_out

    def units(self, step: int | None = None) -> tuple[Unit, ...]:
        """The rows of the batch at hand or of another step's. Raises NotPossible."""
        return self.held.units(self._at(step), self._quarantine)

    def _at(self, step: int | None) -> Held:
        return self.held.at(self.state.step + 1 if step is None else step)

    def rows(self, step: int | None = None) -> tuple[RowId, ...]:
        """Names of all rows of a step. Raises NotPossible."""
        return tuple(row for micro in self.held.rows(self._at(step)) for row in micro)

    @staticmethod
    def _known_rows(held: Held) -> tuple[RowId, ...]:
        """Names cost a pass over the batch: only where they are known already."""
        return tuple(row for micro in held.rows or () for row in micro)

    def clean_steps(self) -> tuple[int, ...]:
        """Earlier steps that were committed without a warning and are still held; newest first."""
        return self.held.clean_up_to(self.state.step)

    def batch(self, step: int | None = None) -> Sequence[Any]:
        """The micro-batches as the loss function gets them. Raises NotPossible."""
        held = self._at(step)
        held.check()
        return [micro for _, micro in self._asked(held, Ask(step=held.step))[0]]
