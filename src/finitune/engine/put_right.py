"""A fault that a look found before the first step, and that the model itself tells how to repair: an incident.

batch at hand, as it is -> the experiment: with the good values in place -> diagnosis -> the plan, proved past the step
    -> journalled, put in place, the same batch again        or: nothing is changed, and the run goes on as it is

Where the experiment does not bear it out there is no incident: the look has told what it saw.

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

_REMEDY = "repair_tensor"


def put_right(guard: Guard, turn_of: type[Turn], repair: Repair, treatment: Treatment) -> Turn | None:
    """The incident of one repair; the batch at hand is computed again after it. None, and nothing is told, where the
    model does no better with the good values.
    """
    started_s = time.perf_counter()
    port, budget = guard.port, Budget(guard.settings.max_replays, guard.settings.max_incident_s)
    try:
        trace = port.forward_backward()
        reading = read(trace)
    finally:
        port.abort()
    finding = replace(repair.finding, veto=True)
    suspicion = Case(Trigger.SILENT, finding, reading, dict(port.facts()), guard._past(), ReplayVerdict.REPRODUCED)
    before = as_snapshot(port)
    try:
        case = _looked_into(Lab(port, suspicion, before, budget, treatment.state_at), repair)
        if case is None:
            return None
        outcome = Outcome(reading, Judgement(Verdict.ABORT, (finding,)), trace.rows)
        turn = turn_of(outcome, Action.TREAT, time.perf_counter() - started_s)
        incident = turn.incident = guard._frozen(turn, Trigger.SILENT)
        plan = _investigated(guard, incident, Lab(port, case, before, budget, treatment.state_at), repair)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        port.abort()
        return None
    finally:
        before.restore(port)
    incident.capsule = guard.hooks.keep(incident, case, before)
    incident.rows = ()  # it is none of theirs, and they are trained on
    incident.replays, incident.time_s = budget.replays + 1.0, budget.elapsed_s
    _treat(guard, turn, incident, plan, repair, treatment)
    return turn


def _looked_into(lab: Lab, repair: Repair) -> Case | None:
    """The case with what the experiment says; None where that does not bear the suspicion out."""
    experiment = registry.load("experiments", repair.experiment)
    found, suspects = perform(lab, lab.case, repair.experiment, experiment)
    return lab.case.with_evidence(found).with_suspects(*suspects) if found.result is Result.GOOD else None


def _investigated(guard: Guard, incident: Incident, lab: Lab, repair: Repair) -> Plan | None:
    """The plan, where the policy allows it and the proof holds."""
    case, settings = lab.case, guard.settings
    guard._entered(incident, Phase.DIAGNOSING)
    incident.verdict, incident.suspects, incident.evidence = case.verdict, case.suspects, tuple(case.evidence.values())
    incident.diagnosis = diagnose(case)
    plans = candidates(case, incident.diagnosis, guard.port.conditions, settings.policy)
    plan = next((p for p in plans if p.remedy == _REMEDY), None)
    if plan is None:
        return None
    guard._entered(incident, Phase.RECOVERING)
    trial = _proved(lab, plan, repair, settings.proof_steps)
    incident.trials = (trial,)
    return plan if trial.holds else None


def _treat(
    guard: Guard, turn: Turn, incident: Incident, plan: Plan | None, repair: Repair, treatment: Treatment
) -> None:
    """Put the good values in place, or say that nothing was done."""
    if plan is None:
        guard._observed(turn, incident)
        treatment.note(incident, None)
    else:
        guard._apply(turn, incident, plan)
        treatment.apply(incident, plan, repair.put)
        guard._entered(incident, Phase.PROBATION)
    guard.hooks.record("incident", step=incident.step, incident=incident.to_json())
    guard.hooks.told(incident)


def _proved(lab: Lab, plan: Plan, repair: Repair, past_steps: int) -> Trial:
    """The run with the good values in place, past the step. They are in the state that the proof starts from."""
    with generators_kept(), repair.in_place():
        start = Lab(lab.port, lab.case, as_snapshot(lab.port), lab.budget, lambda _step: None)
        try:
            trial = prove(start, replace(plan, mends=()), ProofSettings(past_steps))
        except BudgetSpent:
            return Trial(plan.to_json(), False, "no replay is left in the budget")
    return replace(trial, plan=plan.to_json())
