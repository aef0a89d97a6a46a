"""The guard of a bare PyTorch loop: public API.

    guard = finitune.guard(model, optimizer, loss_fn, scheduler=scheduler, scaler=scaler, max_grad_norm=1.0)
    for batch in loader:
        outcome = guard.step(batch)
    guard.close()

Every step is a transaction: computed, judged, then committed or refused. A healthy run has the bits of the plain loop.
A failure is replayed, its cause found by experiment, a cure proved and applied; the loop only sees the outcome.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from torch import nn

from finitune.adapters.bare import BarePort
from finitune.adapters.bare_asked import Loop, LossFn
from finitune.adapters.bare_batch import SplitRows
from finitune.adapters.bare_checks import check
from finitune.adapters.bare_compute import is_writer, watched
from finitune.adapters.bare_held import HeldBatches, RowNames
from finitune.adapters.bare_keep import Keep
from finitune.adapters.codes import BAD_AT_START, CLOSED, NO_PLACE_FOR_STATES
from finitune.core.errors import Halted, UserError
from finitune.core.incident import Incident, Trigger
from finitune.core.types import Finding, Judgement, Reading, Severity
from finitune.core.units import bytes_text
from finitune.engine.codes import TOO_MANY_ABORTS
from finitune.engine.conditions import NotPossible
from finitune.engine.guard import Guard, GuardSettings, Hooks, Turn
from finitune.engine.judge import Judge
from finitune.engine.monitor import Monitor
from finitune.engine.policy import Action, Policy
from finitune.engine.snapshot import SnapshotRing, state_bytes
from finitune.engine.step import Outcome
from finitune.engine.timeline import Timeline
from finitune.engine.treatment import Treatment

_LOG = logging.getLogger("finitune")
# Adam holds two moments of the weights' size, which are not there before the first update.
_STATE_PER_WEIGHT = 3
_MOST_WATCHED = 200


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What became of one batch."""

    loss: float
    """Mean loss of the batch; NaN or inf where it was that."""
    committed: bool
    """The batch changed the weights."""
    action: Action
    findings: tuple[Finding, ...]
    """Everything that was found on the way, in order."""
    incident: Incident | None
    """The last failure that was investigated."""
    reading: Reading
    """All numbers of the step."""


@dataclass(frozen=True, slots=True)
class BareSettings:
    """Limits that hardly anybody needs to change."""

    guard: GuardSettings = field(default_factory=GuardSettings)
    max_aborts_in_a_row: int = 8
    detectors: Mapping[str, Mapping[str, Any] | bool] = field(default_factory=dict)
    """By detector: fields of its Config, or False."""
    max_snapshots: int = 8
    memory_share: float = 0.25
    """Of the free memory, for snapshots of the training state."""


def guard(  # noqa: PLR0913 (the names are the interface)
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: LossFn,
    scheduler: Any = None,
    scaler: torch.amp.GradScaler | None = None,
    run_dir: str | Path | None = None,
    policy: str = "auto",
    *,
    max_grad_norm: float | None = None,
    split_rows: SplitRows | None = None,
    row_ids: RowNames | None = None,
    watch: Sequence[str] | None = None,
    max_replays: float = 60,
    probation_steps: int = 20,
    act_on_forecast: bool = False,
    memory_share: float = 0.25,
) -> BareGuard:
    """Guard a PyTorch loop.

    Args:
        model: what is trained; train or eval mode is the loop's own matter.
        optimizer: any torch optimizer whose step() takes no closure.
        loss_fn: ``loss_fn(model, batch)``: a scalar tensor, or an object with ``.loss``; autocast goes inside.
        scheduler: stepped after every batch. None: rates that the loop sets between steps are respected.
        scaler: ``torch.amp.GradScaler``.
        run_dir: folder for journal, incidents and capsules; None: nothing is written.
        policy: "auto", "safe" (only what loses nothing) or "observe" (find and say, change nothing).
        max_grad_norm: clips as ``clip_grad_norm_`` does; None or 0: no clipping.
        split_rows: ``split_rows(batch, indices)`` takes batches apart whose rows are not the first dimension.
        row_ids: ``row_ids(batch)``, or names in the run's order; by default rows are named by their content.
        watch: names of modules whose ranges are looked at.
        max_replays: forward and backward passes that one incident may cost; 0: failures are only refused.
        probation_steps: steps after which a temporary cure is taken back for a try.
        act_on_forecast: also act on what has not failed yet.
        memory_share: of the free memory, for copies of weights and optimizer state.

    Raises UserError or UserErrors where these do not fit together.
    """
    loop = Loop(model, optimizer, loss_fn, scheduler, scaler, max_grad_norm)
    limits = {"max_replays": max_replays, "probation_steps": probation_steps}
    check(loop, policy, watch, limits, memory_share)
    rules = GuardSettings(policy, max_replays, probation_steps=probation_steps, act_on_forecast=act_on_forecast)
    held = HeldBatches(split_rows, row_ids)
    return BareGuard(loop, held, run_dir, watch, BareSettings(rules, memory_share=memory_share))


class _LoopGuard(Guard):
    """A batch whose gradients overflow under a loss scale is no failure where a plain loop would just go on."""

    port: BarePort

    def _close(self, turn: Turn) -> None:
        self._as_plain(turn)
        super()._close(turn)

    def _incident(self, turn: Turn, trigger: Trigger, treatment: Treatment) -> Turn:
        if self._as_plain(turn):
            super()._close(turn)
            return turn
        return super()._incident(turn, trigger, treatment)

    def _as_plain(self, turn: Turn) -> bool:
        """Whether the turn is such a one; it is a note then, and the batch is given up."""
        was = turn.outcome
        if was.committed or turn.action is Action.TREAT or not self.port.benign_overflow(was.reading):
            return False
        notes = tuple(replace(f, severity=Severity.NOTE) for f in was.judgement.findings)
        turn.outcome = Outcome(was.reading, Judgement(was.judgement.verdict, notes), was.rows)
        turn.action = Action.SKIP_BATCH
        return True


class BareGuard:
    """Guards one loop; made by :func:`guard`. A context manager."""

    def __init__(
        self,
        loop: Loop,
        held: HeldBatches,
        run_dir: str | Path | None = None,
        watch: Sequence[str] | None = None,
        settings: BareSettings | None = None,
    ) -> None:
        """See :func:`guard`, which checks what is handed over."""
        limits = self.settings = settings or BareSettings()
        self.port = BarePort(loop, held, _monitor(loop.model, watch))
        self.keep = Keep(self.port, None if run_dir is None else Path(run_dir))
        self.ring, finding = _ring(self.port, limits)
        self._findings = [finding] if finding is not None else []
        timeline = Timeline(self.port, self.keep.records, self.ring, journal=self.keep.place)
        hooks = Hooks(record=self.keep.record, told=self._told, keep=self.keep.capsule)
        judge = Judge.of({**_known_of(loop.model), **limits.detectors})
        self.engine = _LoopGuard(self.port, judge, Policy(limits.max_aborts_in_a_row), timeline, hooks, limits.guard)
        bad = sorted(self.engine.bad_from_start)
        if bad:
            self._findings.append(BAD_AT_START.find(bad[0], count=len(bad), first=bad[0]))
        self.incidents: list[Incident] = []
        """Closed incidents, oldest first."""
        self._halted: Halted | None = None
        self._closed = False
        self._time_s, self._num_turns = 0.0, 0

    def step(self, batch: Any) -> StepOutcome:
        """Train on one batch, or on a list of micro-batches (each loss is divided by their number: a mean of means).

        Returns what became of it. After a rollback the batches in between are trained on again first.

        Raises:
            Halted: no safe way on is left; weights and moments are those of the last good step.
            UserError: the loss function gave no loss. And whatever it raises itself: the batch then never came.
        """
        self._check_open()
        if isinstance(batch, list) and not batch:
            raise UserError(CLOSED, what="an empty list")
        self.port.push(batch)
        newest, turns = self.port.newest_step, list[Turn]()
        loss: torch.Tensor | None = None
        try:
            while self.port.state.step < newest:
                self._snapshot()
                turns.append(self._one(newest))
                loss = self.port.loss_of_turn
                self._stop_where_due(turns[-1])
        finally:
            self.port.generators_on()
        return self._outcome(turns, loss)

    def _check_open(self) -> None:
        if self._closed:
            raise UserError(CLOSED, what="the guard being closed")
        if self._halted is not None:
            raise self._halted

    def _one(self, newest: int) -> Turn:
        """One transaction; a batch whose loss could not be computed is forgotten."""
        started_s = time.perf_counter()
        self.port.begin_turn()
        try:
            turn = self.engine.one()
        except Halted as halt:
            self._halted = halt
            raise
        except BaseException as error:
            if self.port.state.step == newest - 1:
                self.port.withdraw()
            if isinstance(error, NotPossible) and error.__cause__ is not None:
                raise error.__cause__ from None
            raise
        self._time_s += turn.time_s if turn.time_s > 0 else time.perf_counter() - started_s
        self._num_turns += 1
        return turn

    def _snapshot(self) -> None:
        """Take the snapshot that is due; also one where the held batches would no longer reach from the last one."""
        step, held = self.port.state.step, self.port.held
        for useless in [s for s in self.ring.taken if s.step < held.oldest - 1]:
            self.ring.forget(useless)  # the batches that would lead on from it are gone
        far = bool(self.ring.taken) and step - self.ring.taken[-1].step >= max(1, held.max_count // 2)
        if not (self.ring.due(step) or (far and self.ring.num_slots)):
            return
        mean_s = self._time_s / self._num_turns if self._num_turns else 0.0
        if self.ring.take(self.port, mean_s) is None and self.ring.num_slots == 0:
            self._findings.append(_no_snapshots(state_bytes(self.port), 0, self.settings.memory_share))

    def _stop_where_due(self, turn: Turn) -> None:
        if turn.halt is not None:
            self._halted = turn.halt
        elif turn.action is Action.HALT:
            self._halted = self._too_many(turn)
        if self._halted is not None:
            raise self._halted

    def _too_many(self, turn: Turn) -> Halted:
        state, limit = self.port.state, self.settings.max_aborts_in_a_row
        reasons = [f.code for f in turn.outcome.judgement.findings if f.veto]
        return Halted(
            TOO_MANY_ABORTS,
            self.keep.place,
            count=state.history.aborts_in_a_row,
            step=turn.outcome.reading.step,
            reason=reasons[0] if reasons else "unknown",
            updates=state.updates,
            journal=self.keep.place,
            half_lr=self.port.lr / 2,
            limit=limit,
        )

    def _outcome(self, turns: Sequence[Turn], loss: torch.Tensor | None) -> StepOutcome:
        last = turns[-1]
        found = [f for turn in turns for f in turn.outcome.judgement.findings]
        mine, self._findings = [*self._findings, *self.port.findings], []
        self.port.findings.clear()
        for finding in mine:
            self.keep.record("finding", **finding.to_json())
        incidents = [t.incident for t in turns if t.incident is not None]
        return StepOutcome(
            loss=_exact(loss, last.outcome.reading),
            committed=last.action is Action.PROCEED,
            action=last.action,
            findings=(*mine, *found),
            incident=incidents[-1] if incidents else None,
            reading=last.outcome.reading,
        )

    def _told(self, incident: Incident) -> None:
        self.incidents.append(incident)
        self.keep.tell(incident)
        top = incident.diagnosis.top
        _LOG.warning(
            "incident %d at step %d: %s %s -> %s (%s)",
            incident.number,
            incident.step,
            incident.diagnosis.code,
            top.where if top else incident.finding.where,
            incident.outcome,
            incident.remedy or "no remedy",
        )

    def close(self) -> None:
        """Take all conditions back, remove every hook, close the journal. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self.port.close()
            self.keep.close()

    def __enter__(self) -> BareGuard:
        """The guard itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()


def _known_of(model: nn.Module) -> dict[str, Mapping[str, Any]]:
    """Settings of detectors that follow from the model: the loss of guessing among the tokens of its vocabulary."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    return {"runaway": {"guess_loss": math.log(size)}} if isinstance(size, int) and size > 1 else {}


def _exact(loss: torch.Tensor | None, reading: Reading) -> float:
    """The loss to the bit; a Reading has gone through a sum over tokens, and has 0 where nothing is supervised."""
    if loss is None:
        return reading.loss
    exact = float(loss)
    same = math.isclose(exact, reading.loss, rel_tol=1e-5) or not (math.isfinite(exact) or math.isfinite(reading.loss))
    return exact if same or reading.supervised_tokens == 0 else reading.loss


def _monitor(model: nn.Module, watch: Sequence[str] | None) -> Monitor | None:
    """None where nothing is watched, or where hooks would break compiled code apart."""
    if any(type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None for m in model.modules()):
        return None
    modules = watched(model, watch)
    inputs = [(n, m) for n, m in modules if is_writer(n)]
    return Monitor(modules[:_MOST_WATCHED], inputs[:_MOST_WATCHED]) if modules else None


def _ring(port: BarePort, settings: BareSettings) -> tuple[SnapshotRing, Finding | None]:
    size = state_bytes(port) * _STATE_PER_WEIGHT
    budget = int(psutil.virtual_memory().available * settings.memory_share)
    ring = SnapshotRing.within(budget, size, max_count=settings.max_snapshots)
    return ring, None if ring.num_slots else _no_snapshots(size, budget, settings.memory_share)


def _no_snapshots(needed: int, budget: int, share: float) -> Finding:
    return NO_PLACE_FOR_STATES.find("", needed=bytes_text(needed), budget=bytes_text(budget), share=share)
