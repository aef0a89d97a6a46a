"""Past loss: a step of the past, once more on the state and the batch it was made on, against its recorded loss.

What it changes:
    Nothing of that step. A kept state is taken, its next batch is computed, and the loss is compared with the journal.

What each outcome says:
    BAD: the loss is another one on the old weights and the old batch too. Neither weights nor data nor rate have
    to do with it: the loss is computed in another way. Where the factor is the number of micro-batches, their sum took
    the place of their mean, or the other way round.
    GOOD: the loss of then comes out. The formula is the same; the weights or the data are not.

What it costs:
    One replay for each kept state that is tried, at most three.

Source:
    https://github.com/huggingface/transformers/pull/35438 (trainer and model both left the division out)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from finitune.core.incident import Result, Trigger, Words
from finitune.engine.case import Case
from finitune.engine.conditions import NotPossible
from finitune.engine.experiments._tools import Findings, evidence, precision_explains
from finitune.engine.experiments._updates import of_the_loss
from finitune.engine.experiments.redone_state import leapt
from finitune.engine.lab import Lab
from finitune.engine.rescaled import Again, Past, once_more

ORDER = 31
COST = 1.0
SAYS = {
    Result.BAD: Words(
        "Step {past_step}, computed again on its own weights and batch, has the loss {now}; it was {was}: {factor} "
        "times, and {micros} micro-batches.",
        "第 {past_step} 步在当时的权重和批次上重新计算，损失为 {now}，当时为 {was}：{factor} 倍，微批次数为 {micros}。",
    ),
    Result.GOOD: Words(
        "Step {past_step}, computed again on its own weights and batch, has its loss of then ({was}): the loss is "
        "computed as before.",
        "第 {past_step} 步在当时的权重和批次上重新计算，损失与当时相同（{was}）：损失的计算方式没有改变。",
    ),
}
_MOST = 3


def wanted(case: Case) -> bool:
    """It was seen in the run, or the loss leapt for batches that went well before, and no precision explains it."""
    if not case.past.get("kept") or case.bad("scan_state") or precision_explains(case):
        return False
    if case.trigger is Trigger.OUTLIER:
        return case.bad("known_good_batch") and not case.number("known_good_batch", "num_good")
    return of_the_loss(case) or (case.trigger is Trigger.RUNAWAY and leapt(case))


def run(lab: Lab, case: Case) -> Findings:
    """Compute steps of the past until one comes out otherwise. Raises NotPossible for none at hand, BudgetSpent."""
    tried = list(_tried(lab, case))
    if not tried:
        raise NotPossible("no step of the past can be computed again")
    again = next((a for a in tried if not a.same), tried[0])
    return evidence("past_loss", again.same, **again.numbers(), by_micros=again.by_micros), ()


def _tried(lab: Lab, case: Case) -> Iterator[Again]:
    for past in _spread([_past(k) for k in case.past.get("kept", ())]):
        lab.budget.charge(1.0)
        state = lab.state_at(past.base)
        if state is None:
            continue
        with lab.standing_at(state):
            try:
                again = once_more(lab.port, past)
            except NotPossible:
                continue
        yield again
        if not again.same:
            return


def _past(record: Mapping[str, Any]) -> Past:
    return Past(int(record["base"]), float(record["loss"]), float(record["grad_norm"]))


def _spread(known: list[Past]) -> list[Past]:
    """The newest, one of the middle, the oldest: a change may lie between any of them."""
    places = dict.fromkeys((0, len(known) // 2, len(known) - 1)) if known else {}
    return [known[i] for i in places][:_MOST]
