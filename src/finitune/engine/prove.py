"""The proof of a plan: it is tried on a replay that runs past the failing step, and must hold, before it is applied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from finitune.core.incident import Trial, Trigger
from finitune.engine.conditions import NotPossible
from finitune.engine.lab import Lab, Shot
from finitune.engine.plan import BatchFate, Plan
from finitune.engine.port import ReplayPort
from finitune.engine.snapshot import Snapshot

# A cured run goes on near the losses of before: so far above their median is not a cure. Single batches vary.
MAX_RISE = 1.5
MIN_RISE_NATS = 0.5


@dataclass(frozen=True, slots=True)
class ProofSettings:
    """How far a proof runs."""

    past_steps: int = 2
    """Updates after the failing step."""


def prove(lab: Lab, plan: Plan, settings: ProofSettings) -> Trial:
    """Try a plan from the state it starts at to some steps past the failure; nothing is changed by it.

    Raises BudgetSpent.
    """
    before = lab.budget.replays
    try:
        shots, wanted = _run(lab, plan, settings.past_steps)
    except NotPossible as refusal:
        return Trial(plan.to_json(), False, f"not possible here: {refusal}", (), lab.budget.replays - before)
    losses = tuple(s.reading.loss for s in shots)
    reason = _fault(lab, shots, wanted)
    return Trial(plan.to_json(), reason is None, reason or "holds", losses, lab.budget.replays - before)


def _run(lab: Lab, plan: Plan, past_steps: int) -> tuple[list[Shot], int]:
    """The shots of the trial, and how many there would be if none failed.

    An experiment that walked the very same steps under the very same conditions was the trial already.
    """
    start = lab.before if plan.to_step is None else lab.state_at(plan.to_step)
    if start is None:
        raise NotPossible(f"the state after step {plan.to_step} cannot be had")
    skipping = plan.fate is BatchFate.SKIP
    steps = steps_of(lab, start, past_steps, skipping=skipping)
    if not steps:
        raise NotPossible("there is no batch to try it on")
    known = None if plan.mends or skipping else lab.walked.get((start.step, plan.conditions, tuple(steps)))
    if known is not None and len(known) == len(steps) and not any(s.bad or lab.case.is_bad(s.reading) for s in known):
        return list(known), len(steps)
    options: dict[str, Any] = {"mends": plan.mends, "tolerant": plan.fate is BatchFate.PASS}
    skip_at = lab.before.step if skipping else None
    return lab.course(start, plan.conditions, steps, skip_at=skip_at, **options), len(steps)


def steps_of(lab: Lab, start: Snapshot, past_steps: int, *, skipping: bool = False) -> list[int | None]:
    """What a trial from ``start`` computes: the batches since then, the one that failed, some past it (``Lab.course``).

    ``skipping``: the one that failed is given up.
    """
    # A bare loop that has just committed has no batch at hand.
    own = 0 if skipping or not is_at_hand(lab.port) else 1
    return [*[None] * (lab.before.step - start.step + own), *_past(lab, start, past_steps)]


def _past(lab: Lab, start: Snapshot, count: int) -> list[int | None]:
    """Batches to go on with: the coming ones; where they are not there yet, the newest that went well before.

    Not those of the trial, if there are others: what is trained on twice in a row is learnt by heart.
    """
    ahead = min(count, lab.port.ahead())
    clean = lab.port.clean_steps()
    known = [s for s in clean if s <= start.step] or list(clean)
    return [*[None] * ahead, *known[: count - ahead]]


def is_at_hand(port: ReplayPort) -> bool:
    """There is a batch at the cursor."""
    try:
        port.batch()
    except NotPossible:
        return False
    return True


def _fault(lab: Lab, shots: Sequence[Shot], wanted: int) -> str | None:
    """Why the plan does not hold; None where it does."""
    if not shots:
        return "no step could be computed"
    for shot in shots:
        if shot.bad_state:
            return f"step {shot.reading.step}: the update made {shot.bad_state[0]} non-finite"
        if shot.bad:
            return f"step {shot.reading.step}: loss {shot.reading.loss:.4g}, gradient norm {shot.reading.grad_norm:.4g}"
    if len(shots) < wanted:
        return f"only {len(shots)} of {wanted} steps could be computed"
    return _risen(lab, shots)


def _risen(lab: Lab, shots: Sequence[Shot]) -> str | None:
    """A run that goes on far above where it was has not been cured."""
    # A slow rise is part of the median by now; the detector knows the level of before.
    levels = (lab.case.past.get("median_loss"), lab.case.finding.data.get("before"))
    known = [x for x in levels if isinstance(x, float) and math.isfinite(x)]
    if not known:
        return None
    usual = min(known)
    # One batch may be hard; of those after a rollback, the last ones count.
    tail = [s.reading.loss for s in shots[-max(2, len(shots) // 2) :]]
    limit = max(usual * MAX_RISE, usual + MIN_RISE_NATS)
    if lab.case.trigger is Trigger.OUTLIER and len(tail) > 1:
        tail = tail[1:]
    level = median(tail)
    if not level <= limit:
        return f"the loss stays at {level:.4g}, it was {usual:.4g}"
    return None
