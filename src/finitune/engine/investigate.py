"""The investigation of one failure: replay, localise, experiments, diagnosis, proof. Everything it does is undone.

It ends with a plan that was proved, or with none. Whoever called it decides what becomes of the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from finitune.core.incident import Diagnosis, Evidence, Incident, Phase, Result, Trial, Trigger, Verdict
from finitune.engine import spoilt
from finitune.engine.case import Case
from finitune.engine.diagnose import diagnose
from finitune.engine.experimenting import experiment
from finitune.engine.lab import BudgetSpent, Lab
from finitune.engine.localise import localise
from finitune.engine.plan import Plan
from finitune.engine.prove import ProofSettings, prove
from finitune.engine.remedying import candidates
from finitune.engine.replay import SAME_AGAIN, same_again

MAX_TRIALS = 6


@dataclass(frozen=True, slots=True)
class Found:
    """What an investigation came to."""

    case: Case
    diagnosis: Diagnosis
    trials: tuple[Trial, ...]
    plan: Plan | None
    """Proved; None where no candidate held, or none was wanted."""


def investigate(
    lab: Lab, incident: Incident, policy: str, proof: ProofSettings, entered: Callable[[Phase], None]
) -> Found:
    """Find the cause and a plan that holds. ``entered``: told of each phase before it begins."""
    case = _examined(lab, entered)
    entered(Phase.DIAGNOSING)
    diagnosis = diagnose(case)
    incident.verdict = case.verdict if SAME_AGAIN in case.evidence else None
    incident.suspects = case.suspects
    incident.evidence, incident.diagnosis = tuple(case.evidence.values()), diagnosis
    entered(Phase.RECOVERING)
    trials, plan = _proved(lab, candidates(case, diagnosis, lab.now, policy), proof)
    return Found(case, diagnosis, tuple(trials), plan)


def _examined(lab: Lab, entered: Callable[[Phase], None]) -> Case:
    """The case with all evidence that the budget allowed."""
    case = lab.case
    try:
        entered(Phase.REPLAYING)
        case = lab.case = held_against_the_state(lab, same_again(lab, case))
        if case.verdict is not Verdict.REPRODUCED:
            return _told_of_the_undone(lab, case)
        entered(Phase.LOCALISING)
        try:
            case = lab.case = case.with_suspects(*localise(lab, case))
        except BudgetSpent:
            raise
        except Exception as error:  # noqa: BLE001  (the model's own code under hooks; experiments can still tell)
            lab.port.abort()
            case = lab.case = case.with_evidence(_not_localised(error))
        return experiment(lab, case)
    except BudgetSpent:
        return lab.case


def held_against_the_state(lab: Lab, case: Case) -> Case:
    """What the state held before the failing update already does not fail anew, and does not come and go either."""
    if case.trigger is not Trigger.UPDATE or case.verdict is not Verdict.NOT_REPRODUCED:
        return case
    bad = any(spoilt.is_bad(name, tensor) for name, tensor in lab.before.tensors.items())
    return replace(case, verdict=Verdict.REPRODUCED) if bad else case


def _told_of_the_undone(lab: Lab, case: Case) -> Case:
    """An update was undone, and from the state computed anew it does not fail: what the state of then held."""
    if case.trigger is not Trigger.UPDATE or case.verdict is not Verdict.NOT_REPRODUCED:
        return case
    return case.with_suspects(*spoilt.suspects(case.finding.data.get("places"), lab.before.tensors))


def _not_localised(error: Exception) -> Evidence:
    return Evidence("localise", Result.NOT_RUN, {"reason": f"{type(error).__name__}: {error}"})


def _proved(lab: Lab, plans: Sequence[Plan], proof: ProofSettings) -> tuple[list[Trial], Plan | None]:
    """Try plans in order until one holds; halting needs no proof."""
    trials: list[Trial] = []
    for plan in plans[:MAX_TRIALS]:
        if plan.halts:
            return trials, plan
        try:
            trials.append(prove(lab, plan, proof))
        except BudgetSpent:
            trials.append(Trial(plan.to_json(), False, "no replay is left in the budget"))
            break
        if trials[-1].holds:
            return trials, plan
    return trials, None
