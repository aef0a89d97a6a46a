"""The guard: every step a transaction, every failure an incident.

one()   compute -> judge -> commit | abort -> state check          a healthy step ends here
        failure -> incident: frozen, investigated (engine/investigate.py), treated (engine/treatment.py)

What it remembers over steps (incidents, probation) is part of the training state (``port.state.guard``) and changes
only together with a "treatment" record of the journal, so that redo and resume reach the same state.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from finitune.core.errors import Halted
from finitune.core.incident import Incident, Phase, Trigger
from finitune.core.incident import Verdict as ReplayVerdict
from finitune.core.types import Finding, Judgement, Reading, Severity, Verdict
from finitune.engine.beside import Beside
from finitune.engine.case import Case
from finitune.engine.codes_guard import UPDATE_NOT_FINITE
from finitune.engine.diagnose import diagnose
from finitune.engine.investigate import Found, investigate
from finitune.engine.judge import Judge
from finitune.engine.lab import Budget, Lab
from finitune.engine.line import is_clean
from finitune.engine.plan import BatchFate, Plan
from finitune.engine.policy import Action, Policy, decide, is_scale_overflow
from finitune.engine.port import Capability, ReplayPort
from finitune.engine.prove import ProofSettings
from finitune.engine.ruin import plan_of, ruins
from finitune.engine.silent import Silent, known_past
from finitune.engine.snapshot import Snapshot, as_snapshot, is_out_of_memory
from finitune.engine.spoilt import parted_at, places, suspects, way_back
from finitune.engine.state_check import StateCheck
from finitune.engine.step import Outcome, transact
from finitune.engine.timeline import Timeline, Unreachable
from finitune.engine.treatment import Treatment, halted_by, lost_state
from finitune.engine.triage import RUNAWAY_CODES, cause_of, triage
from finitune.numerics.seeds import generators_kept

_MAX_NAMED = 8


@dataclass(frozen=True, slots=True)
class GuardSettings:
    """How far the guard may go."""

    policy: str = "auto"
    """"observe": find and say; "safe": apply what loses nothing; "auto": also what costs rows, steps or moments."""
    max_replays: float = 60.0
    """Budget of one incident in forward and backward passes; 0 investigates nothing."""
    max_incident_s: float = math.inf
    proof_steps: int = 2
    """Updates past the failing step in the proof of a plan."""
    probation_steps: int = 20
    act_on_forecast: bool = False
    state_check_steps: int = 10
    """The weights are checked after every update, the moments after every so many at the latest."""
    max_relapses: int = 3
    """Incidents of one cause at one place before the run halts."""


@dataclass(slots=True)
class Turn:
    """What one call of :meth:`Guard.one` came to."""

    outcome: Outcome
    action: Action
    time_s: float
    """Seconds of the transaction, without the treatment of an incident."""
    incident: Incident | None = None
    halt: Halted | None = None
    """Set where the run must stop; everything is journalled."""


@dataclass(slots=True)
class Hooks:
    """What the trainer around the guard wants to know or does for it."""

    record: Callable[..., None]
    """``record(kind, **fields)``: a journal line; raises Halted where it cannot be written."""
    told: Callable[[Incident], None] = field(default=lambda _incident: None)
    """An incident was closed."""
    keep: Callable[[Incident, Case, Snapshot], str | None] = field(default=lambda *_: None)
    """Writes the capsule; its place."""
    went_back: Callable[[int], None] = field(default=lambda _step: None)
    """The run went back to a step: what was kept of later ones is of another line."""


class Guard:
    """Watches one port, step by step."""

    def __init__(
        self,
        port: ReplayPort,
        judge: Judge,
        policy: Policy,
        timeline: Timeline | None,
        hooks: Hooks,
        settings: GuardSettings | None = None,
    ) -> None:
        """``timeline`` None: nothing can be undone, so failures are refused but not investigated."""
        self.port, self.judge, self.policy, self.timeline, self.hooks = port, judge, policy, timeline, hooks
        self.settings = settings or GuardSettings()
        self.check, self.beside = StateCheck(port, self.settings.state_check_steps), Beside(port)
        self.silent = Silent(port)
        self.treatment = Treatment(port, timeline, hooks, self.settings.probation_steps) if timeline else None

    @property
    def able(self) -> bool:
        """Whether failures can be investigated on this port and within the budget."""
        possible = self.treatment is not None and Capability.REPLAY in self.port.capabilities()
        return possible and self.settings.max_replays > 0

    def one(self) -> Turn:
        """One transaction, its consequence, its journal lines. A halt is in the Turn; only a lost journal raises."""
        self.check.begin()
        turn = self.beside.begin(self, Turn) or self._one()
        self.check.end(ordinary=turn.incident is None and turn.halt is None)
        return turn

    def _one(self) -> Turn:
        if self.treatment is not None:
            self.treatment.relax()
        started_s, state = time.perf_counter(), self.port.state
        made = self.silent.watched(lambda: transact(self.port, self.judge, state.history))
        outcome = self._told_already(self.beside.end(made))
        action = decide(outcome.judgement, outcome.reading, state.history, self.policy, scale_left=self.port.scale_left)
        spoilt = self._spoilt(outcome)
        turn = Turn(outcome, action, time.perf_counter() - started_s)
        if spoilt:
            return self._update_failed(turn, spoilt)
        outcome = turn.outcome = self.silent.judged(self, outcome)
        trigger = triage(outcome.judgement, outcome.reading, action, act_on_forecast=self.settings.act_on_forecast)
        if trigger is None and outcome.committed and self.able and self.treatment is not None:
            trigger = self._not_back(turn, self.treatment)
        if trigger is None or self.treatment is None or not self.able or self.treatment.is_known(trigger):
            self._close(turn)
            return turn
        return self._incident(turn, trigger, self.treatment)

    def _told_already(self, outcome: Outcome) -> Outcome:
        """A run that runs away is told once: again as a note, and not at all where the data account for it."""
        treatment, codes = self.treatment, {f.code for f in outcome.judgement.findings}
        if treatment is None or codes.isdisjoint(RUNAWAY_CODES):
            return outcome
        kept = [f for f in outcome.judgement.findings if f.code not in RUNAWAY_CODES]
        if not treatment.is_accepted(outcome.reading):
            if not treatment.is_known(Trigger.RUNAWAY):
                return outcome
            again = [f for f in outcome.judgement.findings if f.code in RUNAWAY_CODES]
            kept += [replace(f, severity=Severity.NOTE) for f in again]
        return replace(outcome, judgement=Judgement(outcome.judgement.verdict, tuple(kept)))

    def _not_back(self, turn: Turn, treatment: Treatment) -> Trigger | None:
        """A cure of the run did not bring the losses back: that is a failure of its own."""
        finding = treatment.not_back(turn.outcome.reading)
        if finding is None:
            return None
        was = turn.outcome
        judgement = Judgement(was.judgement.verdict, (*was.judgement.findings, finding))
        turn.outcome = replace(was, judgement=judgement)
        return Trigger.RUNAWAY

    # -- an ordinary step -------------------------------------------------------------------------------------

    def _spoilt(self, outcome: Outcome) -> list[str]:
        return self.check.spoilt(outcome.num_tokens) if outcome.committed else []

    def _close(self, turn: Turn) -> None:
        """Journal a transaction and carry out what was decided."""
        self.write_step(turn)
        outcome, action, was = turn.outcome, turn.action, self.port.loss_scale
        clean = is_clean(action, (f.severity.value for f in outcome.judgement.findings))
        self.port.settle(action, outcome.reading, clean=clean)
        if was is not None and action is not Action.PROCEED and is_scale_overflow(outcome.reading):
            now = self.port.loss_scale
            self.hooks.record("decision", step=outcome.reading.step, what="loss_scale", was=was, now=now)

    def write_step(self, turn: Turn) -> None:
        """The journal line of a transaction."""
        reading, judgement = turn.outcome.reading, turn.outcome.judgement
        self.hooks.record(
            "step",
            attempt=self.port.state.attempt + 1,
            **reading.to_json() | {"time_s": round(turn.time_s, 4), "amax": loudest(reading.amax)},
            verdict=judgement.verdict.value,
            action=turn.action.value,
            rows=[str(r) for r in turn.outcome.rows],
            findings=[f.to_json() for f in judgement.findings],
        )

    # -- a failure --------------------------------------------------------------------------------------------

    def _update_failed(self, turn: Turn, spoilt: list[str]) -> Turn:
        """The update made the state non-finite: it is undone, and investigated."""
        reading = turn.outcome.reading
        # Going back may mend what was corrupt before the update: what the moments held is told now or never.
        moments = [n for n in self.check.bad_now() if "|" in n and n not in self.check.bad_from_start]
        told = places(self.port.state_tensors(), [*moments, *spoilt])
        numbers: dict[str, Any] = {"count": len(spoilt), "first": spoilt[0], "moments": moments[:_MAX_NAMED]}
        numbers["written"] = ", ".join(self.check.written[:_MAX_NAMED]) or "-"
        where = str(told[0]["name"]) if told else (moments or spoilt)[0]
        finding = UPDATE_NOT_FINITE.find(where, veto=True, step=reading.step, loss=reading.loss, places=told, **numbers)
        judgement = Judgement(Verdict.ABORT, (*turn.outcome.judgement.findings, finding))
        turn.outcome = Outcome(reading, judgement, turn.outcome.rows)
        turn.action = Action.HALT
        try:
            if self.timeline is None:
                raise Unreachable(finding)
            self.timeline.undo()
        except Unreachable as reason:
            parted = parted_at(reason.finding) if told and self.able and self.settings.policy == "auto" else None
            if parted is not None and self.treatment is not None:
                return self._another_line(turn, parted, told, self.treatment)
            self.write_step(turn)
            turn.halt = lost_state(finding, reason.finding)
            return turn
        if self.treatment is None or not self.able:
            turn.action = Action.SKIP_BATCH
            self._close(turn)
            return turn
        return self._incident(turn, Trigger.UPDATE, self.treatment)

    def _another_line(self, turn: Turn, parted: int, told: Any, treatment: Treatment) -> Turn:
        """Computed anew, the run is another one from a step on: something wrote into the state, which is not made here.

        The line that was computed anew is the sound one; the run goes on from where the two part.
        """
        incident = turn.incident = self._frozen(turn, Trigger.UPDATE)
        incident.verdict, incident.suspects = ReplayVerdict.NOT_REPRODUCED, suspects(told, {})
        case = Case(incident.trigger, incident.finding, turn.outcome.reading, incident.facts, self._past())
        incident.diagnosis = diagnose(replace(case, verdict=incident.verdict, suspects=incident.suspects))
        plan = way_back(parted, self.port.state.step, self.port.conditions)
        self._apply(turn, incident, plan)
        treatment.apply(incident, plan)
        self._entered(incident, Phase.PROBATION)
        self.hooks.record("incident", step=incident.step, incident=incident.to_json())
        self.hooks.told(incident)
        return turn

    def _incident(self, turn: Turn, trigger: Trigger, treatment: Treatment) -> Turn:
        """Investigate, and treat."""
        if turn.outcome.committed:
            self._close(turn)
        incident = self._frozen(turn, trigger)
        turn.incident = incident
        budget = Budget(self.settings.max_replays, self.settings.max_incident_s)
        try:
            found = self._found(incident, turn.outcome.reading, budget, treatment)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.port.abort()
            incident.outcome = "observed"
            found = None
        incident.replays, incident.time_s = budget.replays, budget.elapsed_s
        self._treat(turn, incident, found, treatment)
        self.hooks.told(incident)
        return turn

    def _frozen(self, turn: Turn, trigger: Trigger) -> Incident:
        reading, state = turn.outcome.reading, self.port.state
        incident = Incident(
            number=len(state.guard.get("incidents", ())) + 1,
            step=reading.step,
            attempt=state.attempt + (0 if turn.outcome.committed else 1),
            trigger=trigger,
            finding=self._judged_by_what_was(trigger, cause_of(trigger, turn.outcome.judgement)),
            reading=reading.to_json(),
            rows=turn.outcome.rows,
            facts=dict(self.port.facts()),
        )
        self._entered(incident, Phase.FROZEN)
        return incident

    def _judged_by_what_was(self, trigger: Trigger, finding: Finding) -> Finding:
        """After a first look at a run that ran away, what was usual before is not the median of what it is now."""
        known = self.treatment.level_before() if self.treatment is not None and trigger is Trigger.RUNAWAY else None
        told = finding.data.get("before")
        if known is None or not isinstance(told, float) or told <= known:
            return finding
        return replace(finding, data={**finding.data, "before": known})

    def _entered(self, incident: Incident, phase: Phase) -> None:
        incident.phase = phase
        self.hooks.record("phase", incident=incident.number, step=incident.step, phase=phase.value)

    def _found(self, incident: Incident, reading: Reading, budget: Budget, treatment: Treatment) -> Found:
        """The investigation; the port is afterwards as it was before."""
        before = as_snapshot(self.port)
        case = Case(incident.trigger, incident.finding, reading, incident.facts, self._past())
        lab = Lab(self.port, case, before, budget, treatment.state_at)
        try:
            with generators_kept():
                found = investigate(
                    lab,
                    incident,
                    self.settings.policy,
                    ProofSettings(self.settings.proof_steps),
                    lambda phase: self._entered(incident, phase),
                )
        finally:
            before.restore(self.port)
        incident.trials = found.trials
        incident.capsule = self.hooks.keep(incident, found.case, before)
        return found

    def _past(self) -> dict[str, Any]:
        history = self.port.state.history
        losses = [math.exp(min(x, 700.0)) for x in history.log_loss]
        norms = [math.exp(min(x, 700.0)) for x in history.log_grad_norm]
        return {
            "steps": self.port.state.step,
            "updates": self.port.state.updates,
            "median_loss": median(losses) if losses else None,
            "median_grad_norm": median(norms) if norms else None,
            "first_loss": None if math.isnan(history.first_loss) else history.first_loss,
            "recent_losses": losses,
            "is_signed": history.is_signed,
            "recent_rates": [math.exp(x) for x in history.log_lr],
            "num_overflows": history.num_overflows,
            "kept": [past.to_json() for past in known_past(self)],
            "incidents": copy.deepcopy(self.port.state.guard.get("incidents", [])),
        }

    def _treat(self, turn: Turn, incident: Incident, found: Found | None, treatment: Treatment) -> None:
        """Carry out the plan that was proved, or what remains without one."""
        plan = plan_of(incident, found)
        if plan is not None and treatment.is_spent(incident, plan, self.settings.max_relapses):
            plan = None
        # What is finite may go on without a cure (an outlier's batch is given up); what fails may not.
        slow = incident.trigger in (Trigger.RUNAWAY, Trigger.FORECAST, Trigger.SILENT, Trigger.OUTLIER)
        without = plan is None or plan.halts
        if self.settings.policy == "observe" or found is None or (slow and without and not ruins(incident)):
            self._observed(turn, incident)
            treatment.note(incident, None)
        elif plan is None or without:
            self._halt(turn, incident)
            treatment.note(incident, None)
        else:
            self._apply(turn, incident, plan)
            treatment.apply(incident, plan)
            self._entered(incident, Phase.PROBATION if plan.fate is BatchFate.RETRY else Phase.CLOSED)
        self.hooks.record("incident", step=incident.step, incident=incident.to_json())

    def _observed(self, turn: Turn, incident: Incident) -> None:
        """Nothing is changed: the batch is given up, as without an investigation."""
        incident.outcome = "observed"
        if not turn.outcome.committed:
            if turn.action is Action.HALT and incident.trigger is Trigger.UPDATE:
                turn.action = Action.SKIP_BATCH
            self._close(turn)
        self._entered(incident, Phase.CLOSED)

    def _halt(self, turn: Turn, incident: Incident) -> None:
        incident.outcome, turn.action = "halted", Action.HALT
        self._entered(incident, Phase.HALTED)
        if not turn.outcome.committed:
            self._close(turn)
        turn.halt = halted_by(incident)

    def _apply(self, turn: Turn, incident: Incident, plan: Plan) -> None:
        incident.remedy = plan.remedy
        incident.outcome = {BatchFate.PASS: "passed", BatchFate.SKIP: "skipped"}.get(plan.fate, "cured")
        if not turn.outcome.committed:
            turn.action = {BatchFate.PASS: Action.PROCEED, BatchFate.SKIP: Action.SKIP_BATCH}.get(
                plan.fate, Action.TREAT
            )
            if plan.fate is BatchFate.PASS:
                self._pass(turn)
            else:
                self._close(turn)

    def _pass(self, turn: Turn) -> None:
        """Commit a step that a detector refused and the experiments found harmless."""
        self.write_step(turn)
        self.port.forward_backward()
        self.port.commit(turn.outcome.reading)
        self.port.settle(Action.PROCEED, turn.outcome.reading, clean=False)


def loudest(amax: Mapping[str, float], count: int = 3) -> dict[str, float]:
    """The modules with the largest magnitudes, non-finite ones first: all of them would be most of the journal."""
    names = sorted(amax, key=lambda n: (math.isfinite(amax[n]), -amax[n] if math.isfinite(amax[n]) else 0.0))
    return {name: amax[name] for name in names[:count]}
