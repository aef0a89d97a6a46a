"""A fault that a look found before the first step, and that the model itself tells how to repair: an incident.

batch at hand, as it is -> the experiment: with the good values in place -> diagnosis -> the plan, proved past the step
    -> journalled, put in place, the same batch again        or: nothing is changed, and the run goes on as it is

Nothing is committed before it is over, so the run begins with what was repaired.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from finitune.core import registry
from finitune.core.incident import Incident, Phase, Result, Trial, Trigger
from finitune.core.incident import Verdict as ReplayVerdict
from finitune.core.types import Judgement, Verdict
from finitune.engine.case import Case
from finitune.engine.diagnose import diagnose
from finitune.engine.experimenting import perform
from finitune.engine.lab import Budget, BudgetSpent, Lab
from finitune.engine.look.repair import Repair
from finitune.engine.monitor import read
from finitune.engine.plan import Plan
from finitune.engine.policy import Action
from finitune.engine.prove import ProofSettings, prove
from finitune.engine.remedying import candidates
from finitune.engine.snapshot import as_snapshot, is_out_of_memory
from finitune.engine.step import Outcome
from finitune.numerics.seeds import generators_kept

if TYPE_CHECKING:
    from finitune.engine.guard import Guard, Turn
    from finitune.engine.treatment import Treatment

_REMEDY, _HARMLESS = "repair_tensor", "let_pass"


def put_right(guard: Guard, turn_of: type[Turn], repair: Repair, treatment: Treatment) -> Turn:
    """The incident of one repair; the batch at hand is computed again afterwards, whatever came of it."""
    started_s = time.perf_counter()
    port = guard.port
    try:
        trace = port.forward_backward()
        reading = read(trace)
    finally:
        port.abort()
    finding = replace(repair.finding, veto=True)
    outcome = Outcome(reading, Judgement(Verdict.ABORT, (finding,)), trace.rows)
    turn = turn_of(outcome, Action.TREAT, time.perf_counter() - started_s)
    incident = turn.incident = guard._frozen(turn, Trigger.SILENT)
    case = Case(incident.trigger, finding, reading, incident.facts, guard._past(), ReplayVerdict.REPRODUCED)
    try:
        plan = _investigated(guard, incident, case, repair, treatment)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        port.abort()
        plan = None
    incident.rows = ()  # it is none of theirs, and they are trained on
    if plan is None:
        guard._observed(turn, incident)
        if any(e.result is Result.BAD for e in incident.evidence):  # the model can do with it, and goes on as it is
            incident.remedy, incident.outcome = _HARMLESS, "passed"
        treatment.note(incident, None)
    else:
        guard._apply(turn, incident, plan)
        treatment.apply(incident, plan, repair.put)
        guard._entered(incident, Phase.PROBATION)
    guard.hooks.record("incident", step=incident.step, incident=incident.to_json())
    guard.hooks.told(incident)
    return turn


def _investigated(guard: Guard, incident: Incident, case: Case, repair: Repair, treatment: Treatment) -> Plan | None:
    """The plan, where the experiment calls for it, the policy allows it and the proof holds. Everything is undone."""
    port, settings = guard.port, guard.settings
    before, budget = as_snapshot(port), Budget(settings.max_replays, settings.max_incident_s)
    lab = Lab(port, case, before, budget, treatment.state_at)
    guard._entered(incident, Phase.DIAGNOSING)
    try:
        experiment = registry.load("experiments", repair.experiment)
        found, suspects = perform(lab, case, repair.experiment, experiment)
        case = case.with_evidence(found).with_suspects(*suspects)
        incident.verdict, incident.suspects, incident.evidence = case.verdict, case.suspects, (found,)
        incident.diagnosis = diagnose(case)
        plans = candidates(case, incident.diagnosis, port.conditions, settings.policy)
        plan = next((p for p in plans if p.remedy == _REMEDY), None)
        if plan is not None:
            guard._entered(incident, Phase.RECOVERING)
            trial = _proved(Lab(port, case, before, budget, treatment.state_at), plan, repair, settings.proof_steps)
            incident.trials, plan = (trial,), plan if trial.holds else None
    finally:
        before.restore(port)
    incident.capsule = guard.hooks.keep(incident, case, before)
    incident.replays, incident.time_s = budget.replays + 1.0, budget.elapsed_s
    return plan


def _proved(lab: Lab, plan: Plan, repair: Repair, past_steps: int) -> Trial:
    """The run with the good values in place, past the step. They are in the state that the proof starts from."""
    with generators_kept(), repair.in_place():
        start = Lab(lab.port, lab.case, as_snapshot(lab.port), lab.budget, lambda _step: None)
        try:
            trial = prove(start, replace(plan, mends=()), ProofSettings(past_steps))
        except BudgetSpent:
            return Trial(plan.to_json(), False, "no replay is left in the budget")
    return replace(trial, plan=plan.to_json())
