"""The looks at a guarded script: at its start, at its first batch, at its first computation.

Each look only reads; a run in which nothing is wrong keeps its bits, and the loss function is called once a batch.
A look that a strange model or batch breaks is given up and said so: it may not cost the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finitune.adapters import bare_batch
from finitune.adapters.bare_asked import Loop
from finitune.adapters.bare_facts import pad_id_of
from finitune.adapters.bare_monitor import is_compiled
from finitune.adapters.codes import NOT_LOOKED
from finitune.core.types import Finding
from finitune.engine.look.batch import Targets, of_batch
from finitune.engine.look.cutting import Further, accumulation
from finitune.engine.look.first_pass import FirstPass
from finitune.engine.look.start import at_start

Parameters = Sequence[tuple[str, nn.Parameter]]


class Looks:
    """The looks of one guard; each thing is said once."""

    def __init__(self, loop: Loop, *, check_accumulation: bool = False) -> None:
        """``check_accumulation``: compute the first step (and uneven ones) once more, cut otherwise."""
        self.loop, self.check_accumulation = loop, check_accumulation
        self._targets, self._further = Targets(), Further()
        self._is_first = True
        self._passed = is_compiled(loop.model)
        self._said: set[tuple[str, str]] = set()

    def start(self) -> list[Finding]:
        """Model, optimizer and schedule as they stand; about three passes over the weights."""
        return self._new(lambda: at_start(self.loop.model, self.loop.optimizer, self.loop.scheduler), "start")

    def batch(self, micros: Sequence[Any], parameters: Parameters) -> list[Finding]:
        """A batch that is handed over: all of the first one, of later ones only whether anything is supervised."""
        named = [[(n, t) for n, t in bare_batch.leaves(m) if isinstance(t, Tensor)] for m in micros]
        found = self._new(lambda: self._targets.add(named), "labels")
        first, self._is_first = self._is_first, False
        if first:
            found += self._new(lambda: of_batch(named, self.loop.model), "batch")
        # How it is cut is looked at in the first step, and in a few uneven ones.
        if self.check_accumulation and len(micros) > 1 and (first or self._further.wants(micros)):
            found += self._new(lambda: self._cut(micros, parameters), "accumulation")
        return found

    def _cut(self, micros: Sequence[Any], parameters: Parameters) -> tuple[Finding, ...]:
        model = self.loop.model
        with torch.enable_grad():
            return accumulation(model, self._loss, micros, parameters, pad_id_of(model))

    def _loss(self, micro: Any) -> Tensor:
        """What loss_fn gives, without the demand for a graph: it is asked under ``no_grad`` as well."""
        given = self.loop.loss_fn(self.loop.model, micro)
        found = given if isinstance(given, Tensor) else getattr(given, "loss", None)
        loss: Tensor = given["loss"] if found is None else found
        return loss.reshape(())

    @property
    def wants_pass(self) -> bool:
        """No computation was looked at yet; one of compiled code never is."""
        return not self._passed

    def computed(
        self, compute: Callable[[], Tensor], parameters: Parameters, scale: float | None
    ) -> tuple[Tensor, list[Finding]]:
        """The loss of ``compute()``, forward and backward, and what its look found."""
        seen = FirstPass(self.loop.model)
        with seen:
            loss = compute()
        self._passed = True
        return loss, self._new(lambda: seen.findings(float(loss), parameters, loss_scale=scale), "first step")

    def _new(self, look: Callable[[], Iterable[Finding]], name: str) -> list[Finding]:
        """What a look finds that was not said before."""
        try:
            found = list(look())
        except Exception as error:  # noqa: BLE001  (models and batches of any kind: a look may not cost the run)
            found = [NOT_LOOKED.find(name, look=name, error=f"{type(error).__name__}: {str(error)[:200]}")]
        fresh = [f for f in found if (f.code, f.where) not in self._said]
        self._said.update((f.code, f.where) for f in fresh)
        return fresh
