"""Known good batches: the newest batches that went well, computed on the weights of the failing step.

What it changes:
    The batch.

What each outcome says:
    GOOD: every one of them is fine. The batch at hand is what fails: one of its rows, or its shape.
    BAD: they fail as well (or some do). The weights, the precision or the rate is at fault, not this batch.

What it costs:
    Two replays.

Source:
    Measured on recipes of each class: data faults leave other batches good, all others do not
"""

from __future__ import annotations

from collections.abc import Sequence

from finitune.core.incident import Result, Trigger, Words
from finitune.engine.case import Case
from finitune.engine.conditions import NotPossible
from finitune.engine.experiments._course import limit_of
from finitune.engine.experiments._tools import Findings, evidence, fails_in_step, update_unexplained
from finitune.engine.lab import Lab
from finitune.engine.port import Ask

ORDER = 30
COST = 2.0
SAYS = {
    Result.GOOD: Words(
        "{num_good} of {num} batches that went well before are good on these weights too: it is this batch.",
        "此前正常的 {num} 个批次在当前权重上仍有 {num_good} 个正常：问题在这个批次。",
    ),
    Result.BAD: Words(
        "Of {num} batches that went well before, {num_good} are good on these weights: it is not this batch alone.",
        "此前正常的 {num} 个批次在当前权重上只有 {num_good} 个正常：问题不只在这个批次。",
    ),
}
NUM_BATCHES = 2


def wanted(case: Case) -> bool:
    """A step failed, and its update was not explained by the optimizer already."""
    return fails_in_step(case) or update_unexplained(case)


def run(lab: Lab, case: Case) -> Findings:
    """Compute them. Raises NotPossible where no batch of before can be had, BudgetSpent."""
    steps = [s for s in lab.port.clean_steps() if s < lab.step][:NUM_BATCHES]
    if not steps:
        raise NotPossible("no batch that went well before is at hand")
    shots = [lab.shoot(ask=Ask(step=step)) for step in steps]
    was = _losses_then(lab, case, steps)
    num_good = sum(not s.bad and not _has_risen(case, s.reading.loss, w) for s, w in zip(shots, was, strict=True))
    losses = [s.reading.loss for s in shots]
    good = num_good == len(shots)
    return evidence("known_good_batch", good, steps=steps, losses=losses, num_good=num_good, num=len(shots)), ()


def _losses_then(lab: Lab, case: Case, steps: Sequence[int]) -> list[float | None]:
    """The losses of these steps when they were made; None where the record does not tell."""
    recent = list(case.past.get("recent_losses", ()))
    in_a_row = steps == [lab.step - 1 - k for k in range(len(steps))] and len(recent) >= len(steps)
    return [recent[-1 - k] if in_a_row else None for k in range(len(steps))]


def _has_risen(case: Case, loss: float, was: float | None) -> bool:
    """An outlier's limit follows the course; a batch that was learnt from and is far worse now is not well either."""
    return case.trigger is Trigger.OUTLIER and was is not None and not loss <= limit_of(was)
