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
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from finitune.adapters.bare import BarePort
from finitune.adapters.bare_asked import Loop, LossFn
from finitune.adapters.bare_batch import SplitRows
from finitune.adapters.bare_beyond import ids_beyond
from finitune.adapters.bare_checks import check
from finitune.adapters.bare_half import RaisedWeights
from finitune.adapters.bare_held import HeldBatches, RowNames, micros_of
from finitune.adapters.bare_keep import Keep
from finitune.adapters.bare_look import Looks
from finitune.adapters.bare_loop import LoopGuard
from finitune.adapters.bare_memory import Room
from finitune.adapters.bare_monitor import monitor_of
from finitune.adapters.bare_outcome import BareSettings, StepOutcome, at_start, exact_loss, known_of
from finitune.adapters.bare_resume import Arrival, saved_state, taken_over
from finitune.adapters.bare_rows import named
from finitune.adapters.codes import CLOSED, NOT_LOOKED
from finitune.adapters.ranks import inner_of
from finitune.adapters.ranks_lead import RanksGuard
from finitune.adapters.ranks_team import Pace, Team, calling
from finitune.core.errors import Halted, UserError
from finitune.core.incident import Incident
from finitune.core.types import Finding, Severity
from finitune.engine.capsule import CapsuleOptions
from finitune.engine.codes import TOO_MANY_ABORTS
from finitune.engine.conditions import Conditions, NotPossible
from finitune.engine.guard import GuardSettings, Hooks, Turn
from finitune.engine.judge import Judge
from finitune.engine.policy import Action, Policy
from finitune.engine.snapshot import SnapshotRing
from finitune.engine.timeline import Timeline

_LOG = logging.getLogger("finitune")
_LEVELS = {Severity.NOTE: logging.INFO, Severity.WARNING: logging.WARNING, Severity.ERROR: logging.ERROR}


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
    capsule_rows: str = "full",
    capsule_weights: str = "auto",
    check_accumulation: bool = False,
    ranks: Any = None,
) -> BareGuard:
    """Guard a PyTorch loop.

    Args:
        model: what is trained; train or eval mode is the loop's own matter.
        optimizer: any torch optimizer whose step() takes no closure.
        loss_fn: ``loss_fn(model, batch)``: a scalar tensor, or an object with ``.loss``; autocast goes inside.
        scheduler: stepped after every batch. None: rates that the loop sets between steps are respected.
        scaler: ``torch.amp.GradScaler``; trainable fp16 weights, which it refuses, are raised to fp32 (OPT114).
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
        capsule_rows: "full", or "ids": capsules hold no data, only the names of rows, and cannot be replayed.
        capsule_weights: "full", "lora" (what is trained, with moments), "digest", or "auto": "lora" up to 256 MiB.
        check_accumulation: see whether a step of micro-batches depends on how it is cut; loss_fn is called more often.
        ranks: the process group, by default that of DistributedDataParallel or the default one: all ranks decide
            together, and each keeps a journal, rank N in run_dir/rank_N. False: this process alone.

    Raises UserError or UserErrors where these do not fit together.
    """
    loop = Loop(inner_of(model), optimizer, calling(model, loss_fn), scheduler, scaler, max_grad_norm)
    limits = {"max_replays": max_replays, "probation_steps": probation_steps}
    check(loop, policy, watch, limits, memory_share, (capsule_rows, capsule_weights))
    rules = GuardSettings(policy, max_replays, probation_steps=probation_steps, act_on_forecast=act_on_forecast)
    held, capsule = HeldBatches(split_rows, row_ids), CapsuleOptions(capsule_rows, capsule_weights)
    team = Team.of(model, ranks)
    cut = check_accumulation and team is None  # it computes as often as the batch asks for: ranks would part
    settings = BareSettings(rules, memory_share=memory_share, capsule=capsule, check_accumulation=cut)
    made = BareGuard(loop, held, team.folder(run_dir) if team else run_dir, watch, settings, team)
    if check_accumulation and team is not None:
        made.note([NOT_LOOKED.find("accumulation", look="accumulation", error="several ranks")])
    return made


class BareGuard:
    """Guards one loop; made by :func:`guard`. A context manager."""

    def __init__(
        self,
        loop: Loop,
        held: HeldBatches,
        run_dir: str | Path | None = None,
        watch: Sequence[str] | None = None,
        settings: BareSettings | None = None,
        team: Team | None = None,
    ) -> None:
        """See :func:`guard`, which checks what is handed over. ``team``: of several ranks."""
        limits = self.settings = settings or BareSettings()
        self.raised = RaisedWeights.of(loop, alone=team is None)
        monitor = monitor_of(loop.model, watch)
        self.port = BarePort(loop, held, monitor) if team is None else team.port(loop, held, monitor)
        self.keep = Keep(self.port, None if run_dir is None else Path(run_dir), limits.capsule)
        self.room = Room(self.port, limits.memory_share, limits.max_snapshots)
        self.findings: list[Finding] = []
        """Everything that was found so far outside of the detectors, oldest first; also where the run then halted."""
        self._untold: list[Finding] = []
        bases = self.port.skips.bases
        timeline = Timeline(self.port, self.keep.records, self.room.ring, bases, journal=self.keep.place)
        hooks = Hooks(record=self.keep.record, told=self.tell, keep=self.keep.capsule)
        judge = Judge.of({**known_of(loop.model), **limits.detectors})
        kind = LoopGuard if team is None else RanksGuard
        self.engine = kind(self.port, judge, Policy(limits.max_aborts_in_a_row), timeline, hooks, limits.guard)
        self.pace = None if team is None else Pace(self.port, self.room.ring)
        if team is not None:
            self.engine.beside.close()
            self.engine.silent.looks_back = False  # all ranks would have to, or none
        self.looks = self.port.looks = Looks(loop, check_accumulation=limits.check_accumulation)
        self.note([] if self.raised is None else [self.raised.finding])
        self.note(at_start(self.room, self.looks, self.engine.check.bad_from_start))
        self.incidents: list[Incident] = []
        """Closed incidents, oldest first."""
        self._halted: Halted | None = None
        self._closed = False
        self._arrival: Arrival | None = None
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
        if self._arrival is not None:
            self.note(self._arrival.finish(self, batch))
            self._arrival = None
        found = self.looks.batch(micros_of(batch), self.port.parameters())
        self.port.push(batch)
        self.note(named(found, self.port.held))
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
            self.note(self.port.findings)
            self.port.findings.clear()
        return self._outcome(turns, loss)

    def note(self, findings: Iterable[Finding]) -> None:
        """Keep, record and log what was found; the next outcome tells it."""
        for finding in findings:
            self.findings.append(finding)
            self._untold.append(finding)
            self.keep.record("finding", **finding.to_json())
            _LOG.log(_LEVELS[finding.severity], "%s %s", finding.code, finding.where)

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
            batch = self.port.held.at(newest) if newest in self.port.held else None
            if self.port.state.step == newest - 1:
                self.port.withdraw()
            if self.raised is not None and (refused := self.raised.refused(error)) is not None:
                self.close()
                raise refused from error
            if (told := ids_beyond(error, batch, self.port.held, self.port.model)) is not None:
                raise told from error
            if isinstance(error, NotPossible) and error.__cause__ is not None:
                raise error.__cause__ from None
            raise
        self._time_s += turn.time_s if turn.time_s > 0 else time.perf_counter() - started_s
        self._num_turns += 1
        if self.raised is not None and turn.outcome.committed:
            turn.incident = turn.incident or self.raised.told(self, turn)
            self.raised = None
        return turn

    def _snapshot(self) -> None:
        """Take the snapshot that is due; also one where the held batches would no longer reach from the last one."""
        step, held, ring = self.port.state.step, self.port.held, self.room.ring
        if self.pace is not None:
            self.pace.keep()
        for useless in [s for s in ring.taken if s.step < self.port.oldest_step - 1]:
            ring.forget(useless)  # the batches that would lead on from it are gone
        far = bool(ring.taken) and step - ring.taken[-1].step >= max(1, held.max_count // 2)
        if not (ring.due(step) or (far and ring.num_slots)):
            return
        found = self.room.measured()
        if self.pace is not None:
            self.pace.agree()
        mean_s = self._time_s / self._num_turns if self._num_turns else 0.0
        if ring.num_slots and ring.take(self.port, mean_s) is None:
            found = self.room.missing()
        if self.pace is not None:
            self.pace.taken()
        self.note([found] if found is not None else [])

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
        mine, self._untold = self._untold, []
        incidents = [t.incident for t in turns if t.incident is not None]
        return StepOutcome(
            loss=exact_loss(loss, last.outcome.reading),
            committed=last.action is Action.PROCEED,
            action=last.action,
            findings=(*mine, *found),
            incident=incidents[-1] if incidents else None,
            reading=last.outcome.reading,
        )

    def tell(self, incident: Incident) -> None:
        """A closed incident is kept and logged."""
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

    # -- saved with the script, and taken over -------------------------------------------------------------------

    def state_dict(self, *, history: str = "full") -> dict[str, torch.Tensor]:
        """What the script saves next to model, optimizer, scheduler and scaler, between two steps; tensors only.

        Counters, statistics, incidents, cures in force and in probation, rows in quarantine, the states of the random
        generators, and of what was before:

        Args:
            history: "full": the newest batches (up to 256 MiB) and one snapshot of weights and optimizer state from
                before them, so that an incident after the resume ends as in a run that never stopped; "batches":
                without the snapshot, a third of the size: no going back past this moment; "none".

        Raises UserError SYS429 once closed.
        """
        if self._closed:
            raise UserError(CLOSED, what="the guard being closed (guard.state_dict: save it before)")
        return saved_state(self, history)

    def load_state_dict(self, state: Mapping[str, torch.Tensor], *, generators: str = "next_step") -> None:
        """Go on as the guard whose state this is; load model, optimizer, scheduler and scaler before it.

        Args:
            state: what :meth:`state_dict` gave, from any device.
            generators: when the global random generators are put back: "next_step" right before the next step is
                computed (what a loader draws in between does not count), "now", or "keep": never.

        The first step then says (SYS431) where weights, moments, schedule or scale are not those of that moment.

        Raises UserError: SYS430 for what is no such state, with nothing changed; SYS429 once closed.
        """
        if self._closed:
            raise UserError(CLOSED, what="the guard being closed (guard.load_state_dict)")
        self._arrival = taken_over(self, state, generators)
        self._halted = None

    @property
    def untold(self) -> Sequence[Finding]:
        """Findings that no outcome has told yet, as after a first step that halted."""
        return tuple(self._untold)

    @property
    def num_batches(self) -> int:
        """Batches that are used up: a loop that goes on passes over so many."""
        return self.port.state.step

    @property
    def ring(self) -> SnapshotRing:
        """The snapshots in memory."""
        return self.room.ring

    @property
    def conditions(self) -> Conditions:
        """The cures in force."""
        return self.port.conditions

    def __repr__(self) -> str:
        state, cures = self.port.state, self.conditions.to_json()
        told = [f"{state.step} batches", f"{state.updates} updates", f"{len(self.incidents)} incidents"]
        told += [f"policy {self.settings.guard.policy}", *([f"cures {cures}"] if cures else [])]
        return f"<BareGuard: {', '.join(told)}{', closed' if self._closed else ''}>"

    def __reduce__(self) -> Any:
        raise TypeError(
            "a guard holds hooks, a model and a journal, and cannot be copied or pickled: save state_dict()"
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
