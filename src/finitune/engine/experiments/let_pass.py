"""Let it pass: the step that stands out is committed after all, and batches that went well are computed after it.

What it changes:
    The update that was refused is made, then undone.

What each outcome says:
    GOOD: their losses stay near those of before. The step is a hard or rare sample and does no harm.
    BAD: they rise. The update harms what the model had learnt. Where losses are of either sign (policy gradients) a
    known batch counts as harmed only beyond all losses that the run has had lately: it is no measure of what the policy
    knows, and moves with every ratio.

What it costs:
    One replay for the step, one for each of two batches; two more where their losses of before are not known yet.

Source:
    Chowdhery et al. 2022, "PaLM", section 5.1 (arXiv:2204.02311): spikes come from batch and state together
"""

from __future__ import annotations

import math

from finitune.core.incident import Result, Trigger, Words
from finitune.engine.case import Case
from finitune.engine.conditions import NotPossible
from finitune.engine.experiments._tools import Findings, evidence, finite
from finitune.engine.experiments.update_share import commit
from finitune.engine.lab import Lab

ORDER = 48
COST = 3.0
SAYS = {
    Result.GOOD: Words(
        "After the step was let through, batches that went well keep their losses: {before} before, {after} after.",
        "放行该步之后，此前正常的批次损失不变：之前 {before}，之后 {after}。",
    ),
    Result.BAD: Words(
        "After the step was let through, batches that went well lose: {before} before, {after} after.",
        "放行该步之后，此前正常的批次变差：之前 {before}，之后 {after}。",
    ),
}
NUM_BATCHES = 2
# One ordinary step changes the loss of another batch by far less; a harmful one changes it by nats.
MAX_RISE_SHARE = 0.1
MIN_RISE_NATS = 0.1


def wanted(case: Case) -> bool:
    """A finite step stands out, batches of before are good on these weights, and the state is sound."""
    sound = not (case.bad("known_good_batch") or case.bad("scan_state") or case.bad("supervised_tokens"))
    return case.trigger is Trigger.OUTLIER and sound and math.isfinite(case.reading.grad_norm)


def run(lab: Lab, case: Case) -> Findings:
    """Commit, look at known batches, undo. Raises NotPossible, BudgetSpent."""
    steps, before = _known(case)
    if not steps:
        steps = [s for s in lab.port.clean_steps() if s < lab.step][:NUM_BATCHES]
        before = lab.losses_of(steps)
    if not steps:
        raise NotPossible("no batch that went well before is at hand")
    with lab.standing_at(lab.before):
        commit(lab)
        after = lab.losses_of(steps)
    usual = _usual_spread(case)
    good = all(a <= b + max(MAX_RISE_SHARE * b, MIN_RISE_NATS, usual) for a, b in zip(after, before, strict=True))
    return evidence("let_pass", good, before=before, after=after), ()


def _usual_spread(case: Case) -> float:
    """How far from 0 the losses of either sign have been lately; 0 where all are positive."""
    return max(finite(case.past.get("recent_losses") or []), default=0.0) if case.past.get("is_signed") else 0.0


def _known(case: Case) -> tuple[list[int], list[float]]:
    """Steps and losses that the experiment with known batches has computed already."""
    steps = case.number("known_good_batch", "steps", [])
    losses = finite(case.number("known_good_batch", "losses", []))
    return (list(steps), losses) if len(steps) == len(losses) else ([], [])
