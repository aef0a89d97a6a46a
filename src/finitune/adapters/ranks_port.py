"""A bare loop on several ranks as one port: what is computed, and what every decision depends on, is shared.

    opening   before the first backward, and before each further one: has loss_fn raised anywhere? Then nobody begins
              to exchange gradients.
    closing   after the last backward: loss, tokens, gradient norm of every rank. The trace that the engine gets is of
              all ranks, bit for bit the same on each.

A rank without rows (all in quarantine), or with fewer micro-batches, takes part with a batch that went well before, at
weight 0. While an incident is led by one rank, the others are mirrors of its state: see ``ranks_lead.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from finitune.adapters.bare import BarePort
from finitune.adapters.bare_asked import Loop
from finitune.adapters.bare_compute import SideEffects, loss_of
from finitune.adapters.bare_held import Held, HeldBatches, Numbered
from finitune.adapters.codes import QUARANTINED_BATCH
from finitune.adapters.codes_ranks import NOT_THE_SAME, NOTHING_TO_STAND_IN, OTHER_RANK_FAILED
from finitune.adapters.ranks import Ranks, largest, same_bits
from finitune.core.errors import UserError
from finitune.engine.conditions import NotPossible
from finitune.engine.monitor import Monitor
from finitune.engine.port import WHOLE, Ask, Trace
from finitune.numerics.norms import total_norm
from finitune.numerics.seeds import generators_kept

_WIDTH = 8
"""Numbers in a message; openings and closings are as long, so that a rank that failed meets those that did not."""
_FAILED, _COUNT, _LOSS, _SUPERVISED, _TOKENS, _NORM, _PACE, _OLDEST = range(_WIDTH)


class Elsewhere(UserError):
    """The loss function raised on another rank."""


class RanksPort(BarePort):
    """One rank's part of a bare loop. Its model is the one inside of DistributedDataParallel."""

    def __init__(self, loop: Loop, held: HeldBatches, monitor: Monitor | None, ranks: Ranks, called: nn.Module) -> None:
        """``loop.loss_fn`` takes any model and calls ``called``, the one that the script calls."""
        super().__init__(loop, held, monitor)
        self.ranks, self.called = ranks, called
        self._effects = SideEffects(loop.model, buffers=called is loop.model)
        self.pace = 1
        """Steps between snapshots: those of rank 0."""
        self._oldest = 1
        self.local_losses: list[float] = []
        """Of the last computation, by rank."""
        self.local_norms: list[float] = []
        """Of the last computation, by rank, after the exchange."""
        self.stand_in_at: int | None = None
        """In an incident: at this step another batch takes the place of this rank's, which is bad as well."""
        self.announce: Any = None
        """Of the rank that leads an incident: called with what is asked for, before it is computed."""
        self.apart = False
        """Gradients were seen that differ between the ranks: the replicas are none."""
        self._is_open = self._entered = False
        self._own, self._most = 0, 0
        self._local: Tensor | None = None
        self._handle = loop.model.register_forward_pre_hook(self._saw_forward)

    def _saw_forward(self, _module: nn.Module, _args: Any) -> None:
        self._entered = True

    @property
    def oldest_step(self) -> int:
        """The first step that every rank still held when a step was last computed."""
        return self._oldest

    # -- one computation of all ranks -------------------------------------------------------------------------

    def forward_backward(self, ask: Ask = WHOLE) -> Trace:
        """As :meth:`BarePort.forward_backward`, on all ranks together. Where one of them raises, all do."""
        if self.announce is not None:
            self.announce(ask)
        return self.together(ask)

    def together(self, ask: Ask) -> Trace:
        """The own part of a computation that all ranks begin now."""
        self._is_open, self._entered, self._own, self._most, self._local = True, False, 0, 0, None
        step = self.state.step + 1 if ask.step is None else ask.step
        if self.stand_in_at == step and self.clean_steps():
            ask = Ask(step=self.clean_steps()[0])
        try:
            trace = super().forward_backward(ask)
        except Exception as error:
            if self._is_open:
                self._join_forward()
                self._meet(error)
            raise
        return self._closed(trace)

    def _meet(self, error: BaseException | None, *closing: float) -> list[list[float]]:
        """One message of all ranks. Raises Elsewhere where another one failed and this one did not."""
        told = [float(error is not None), float(self._own), *closing]
        rows = self.ranks.gather([*told, *[0.0] * (_WIDTH - len(told))])
        failed = [r for r, row in enumerate(rows) if row[_FAILED]]
        if failed:
            self._is_open = False
            said = self.ranks.share(f"{type(error).__name__}: {str(error)[:300]}", failed[0])
            if error is None:
                raise Elsewhere(OTHER_RANK_FAILED, f"rank {failed[0]}", rank=failed[0], error=said)
        return rows

    def _join_forward(self) -> None:
        """DistributedDataParallel exchanges buffers before a forward: a rank that did not get there still does that."""
        if self._entered or not isinstance(self.called, nn.parallel.DistributedDataParallel):
            return
        with torch.enable_grad():
            self.called._pre_forward()  # type: ignore[no-untyped-call]

    def _loss(self, batch: Any, micro: int) -> Tensor:
        """The loss, once all ranks have theirs."""
        self._entered = False
        loss = super()._loss(batch, micro)
        self._opened()
        return loss

    def _opened(self) -> None:
        rows = self._meet(None)
        if not self._most:
            self._most = int(max(row[_COUNT] for row in rows))

    def _computed(self, held: Held, numbered: Numbered, *, first: bool) -> Tensor:
        self._own = len(numbered)
        total = super()._computed(held, numbered, first=first) if numbered else self._nothing()
        done = len(numbered)
        while done < max(1, self._most):
            self._stand_in(held)
            done += 1
        self._local = total
        return total

    def _nothing(self) -> Tensor:
        return torch.zeros((), device=self._parameters[0][1].device)

    def _stand_in(self, held: Held) -> None:
        """Take part in an exchange of gradients with nothing to add to them."""
        clean = self.clean_steps()
        self._entered = False
        with generators_kept(), self.realiser.forward():
            if not clean:
                most = self._most or "more"
                raise UserError(NOTHING_TO_STAND_IN, rank=self.ranks.rank, count=self._own, step=held.step, most=most)
            loss = loss_of(self.loop.loss_fn(self.model, self.held.at(clean[0]).micros[0]), 0)
            self._opened()
            (loss * 0.0).backward()  # type: ignore[no-untyped-call]

    def _empty(self, held: Held, left_out: int) -> Trace:
        """All rows of this rank are in quarantine; those of the others may not be."""
        self.findings.append(QUARANTINED_BATCH.find(f"step {held.step}", step=held.step, count=left_out))
        return self._traced(held, [], first=not held.states)

    # -- the trace of all ranks -------------------------------------------------------------------------------

    def _closed(self, trace: Trace) -> Trace:
        own = float(self._local) if self._local is not None else math.nan
        norm = float(total_norm(trace.norms_P))
        told = (
            own,
            float(trace.num_supervised),
            float(trace.num_tokens),
            norm,
            float(self.pace),
            float(self.held.oldest),
        )
        rows = self._meet(None, *told)
        self._is_open = False
        self.local_losses, self.local_norms = [r[_LOSS] for r in rows], [r[_NORM] for r in rows]
        self.pace, self._oldest = int(rows[0][_PACE]), int(max(r[_OLDEST] for r in rows))
        return self._of_all(trace, rows)

    def _of_all(self, trace: Trace, rows: list[list[float]]) -> Trace:
        """The mean of the ranks' losses, as DistributedDataParallel takes that of their gradients."""
        counted = [r for r in rows if r[_COUNT]] or rows
        mean = math.fsum(r[_LOSS] for r in counted) / len(counted) if _all_finite(counted) else _worst(counted)
        supervised = int(sum(r[_SUPERVISED] for r in rows))
        loss_sum = torch.tensor(mean * supervised if supervised else 0.0, device=trace.loss_sum.device)
        if self.announce is not None and not math.isfinite(float(trace.loss_sum)):
            loss_sum = trace.loss_sum  # the very tensor, so that its origin can be traced
        if self.loss_of_turn is self._local:
            self.loss_of_turn = torch.tensor(mean, dtype=torch.float64)
        trace = replace(
            trace, loss_sum=loss_sum, num_supervised=supervised, num_tokens=int(sum(r[_TOKENS] for r in rows))
        )
        return self._ranges_of_all(self._norms_of_all(trace, [r[_NORM] for r in rows]))

    def _norms_of_all(self, trace: Trace, norms: list[float]) -> Trace:
        if same_bits(norms):
            return trace
        most, least = largest(norms), min(range(len(norms)), key=lambda r: (not math.isfinite(norms[r]), norms[r]))
        where: dict[str, Any] = {"least": norms[least], "most": norms[most], "least_rank": least, "most_rank": most}
        if not self.apart:
            self.apart = True
            self.findings.append(NOT_THE_SAME.find(f"rank {most}", step=trace.step, **where))
        worst = torch.tensor([norms[most]], dtype=torch.float32, device=trace.norms_P.device)
        return replace(trace, norms_P=worst, parameter_names=[f"rank {most}"])

    def _ranges_of_all(self, trace: Trace) -> Trace:
        """Least and greatest values over all ranks, where the monitor looked on all of them."""
        seen = trace.ranges_M2
        sizes = self.ranks.gather([0.0 if seen is None else float(len(seen))]) if self._looks() else [[0.0]]
        if seen is None or not same_bits([s[0] for s in sizes]):
            return replace(trace, ranges_M2=None, watch_names=(), wide_names=frozenset())
        all_RM2 = torch.stack(self.ranks.gather_tensor(seen))
        low_M, high_M = all_RM2[..., 0].amin(0), all_RM2[..., 1].amax(0)
        return replace(trace, ranges_M2=torch.stack([low_M, high_M], dim=1))

    def facts(self) -> Mapping[str, Any]:
        """As of one process, with the rank that tells them."""
        return {**super().facts(), "rank": self.ranks.rank, "num_ranks": self.ranks.size}

    def close(self) -> None:
        """Take all conditions back and remove every hook."""
        super().close()
        self._handle.remove()

    # -- which rank ---------------------------------------------------------------------------------------------

    def own_norms(self) -> list[float]:
        """The norm of every rank's own gradients of the batch at hand, before they are exchanged; one computation."""
        squares: list[Tensor] = []
        handles: list[Any] = []
        for _, parameter in self._parameters:
            handles.append(parameter.register_hook(lambda g: squares.append(_square(g))))  # type: ignore[no-untyped-call]
        try:
            self.together(WHOLE)
        except (NotPossible, UserError):
            return [0.0] * self.ranks.size
        finally:
            for handle in handles:
                handle.remove()
            self.abort()
        total = float(torch.stack([s.cpu() for s in squares]).sum().sqrt()) if squares else 0.0
        return [row[0] for row in self.ranks.gather([total])]


@torch.no_grad()
def _square(gradient: Tensor) -> Tensor:
    return gradient.detach().float().square().sum().double()


def _all_finite(rows: list[list[float]]) -> bool:
    return all(math.isfinite(r[_LOSS]) for r in rows)


def _worst(rows: list[list[float]]) -> float:
    """The same on every rank: NaN where one is, else an infinity."""
    values = [r[_LOSS] for r in rows]
    return math.nan if any(math.isnan(v) for v in values) else sum(values)
