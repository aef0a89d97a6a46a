"""Fresh moments: the step and its update after the optimizer has forgotten what it holds.

What it changes:
    The optimizer's state: of all parameters, then only of those under suspicion; both are undone.

What each outcome says:
    GOOD: the update stays finite, so the moments spoil it (a flipped bit, a bad resume, an overflow in half).
    BAD: a first step from nothing is spoilt too; gradient, weight or the formula is at fault.

What it costs:
    One replay; a second one where single moments are under suspicion.

Source:
    https://github.com/NVIDIA-NeMo/Automodel/issues/763 (an optimizer state that was not restored);
    SPAM (Huang et al. 2025, arXiv:2501.06842) for the reset of moments as a cure
"""

from __future__ import annotations

from collections.abc import Sequence

from finitune.core.incident import Result, Trigger, Words
from finitune.engine.case import Case
from finitune.engine.experiments._tools import Findings, evidence
from finitune.engine.lab import Lab, Shot
from finitune.engine.plan import Mend, Operation

ORDER = 24
COST = 2.0
SAYS = {
    Result.GOOD: Words(
        "With the optimizer's moments started anew the update stays finite (loss {loss}).",
        "重置优化器的动量后，更新保持有限（损失 {loss}）。",
    ),
    Result.BAD: Words(
        "With the optimizer's moments started anew the update is spoilt as before: {state_bad}.",
        "重置优化器的动量后，更新仍然损坏：{state_bad}。",
    ),
}


def wanted(case: Case) -> bool:
    """The update spoils the state."""
    return case.trigger is Trigger.UPDATE


def run(lab: Lab, case: Case) -> Findings:
    """One update without any moments, then without those under suspicion. Raises NotPossible, BudgetSpent."""
    everything = tuple(name for name, _ in lab.port.parameters())
    shot = _after_reset(lab, everything)
    suspected = suspected_parameters(case, everything)
    only: list[str] = []
    if not shot.bad and 0 < len(suspected) < len(everything) and not _after_reset(lab, suspected).bad:
        only = list(suspected)
    found = evidence(
        "fresh_moments",
        not shot.bad,
        loss=shot.reading.loss,
        state_bad=list(shot.bad_state[:8]),
        parameters=list(everything),
        only=only,
    )
    return found, ()


def _after_reset(lab: Lab, names: Sequence[str]) -> Shot:
    return lab.course(lab.before, lab.now, [None], mends=[Mend(Operation.RESET_MOMENTS, tuple(names))])[0]


def suspected_parameters(case: Case, parameters: Sequence[str]) -> tuple[str, ...]:
    """The parameters whose weights or moments are under suspicion: a moment's name holds its parameter's."""
    found = []
    for suspect in case.suspects_of("parameter", "moment"):
        owners = [p for p in parameters if p == suspect.name or suspect.name.startswith(f"{p}|")]
        if owners:
            found.append(max(owners, key=len))
    return tuple(dict.fromkeys(found))
