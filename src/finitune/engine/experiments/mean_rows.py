"""Mean rows: rows of the vocabulary that are out of all proportion become the mean of the others, for one replay.

What it changes:
    Rows of a trained embedding or output head that are more than 20 times as long as the median row. They take the mean
    of all other rows, what new tokens are given at best, and are put back.

What each outcome says:
    GOOD: the loss falls by more than these rows could be owed. Were they ordinary rows, all of them together would get
    their share of the probability, rows / vocabulary; a fall of d nats says that a share of 1 - exp(-d) was taken from
    the right answers, which they give back when they are ordinary. So they do not fit, and nothing is lost with them.
    BAD: the loss stays or rises: the model knows these rows, or does not use them.

What it costs:
    Two replays; nothing where no row is out of scale.

Source:
    Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"; transformers,
    ``resize_token_embeddings(mean_resizing=True)``
"""

from __future__ import annotations

import math
from typing import Any

import torch

from finitune.core.incident import Result, Suspect, Trigger, Words
from finitune.engine.case import Case
from finitune.engine.conditions import NotPossible
from finitune.engine.experiments._tools import Findings, evidence
from finitune.engine.lab import Lab
from finitune.engine.look.codes import HOT_ROWS
from finitune.engine.look.repair import Repair, of_rows

ORDER = 44
COST = 2.0
SAYS = {
    Result.GOOD: Words(
        "With {num_rows} rows of {first} set to the mean of the others (tokens {tokens}) the loss of the same batch "
        "is {loss} instead of {was}.",
        "把 {first} 的 {num_rows} 行（词元 {tokens}）设为其余行的平均值后，同一批的损失为 {loss}，原为 {was}。",
    ),
    Result.BAD: Words(
        "With {num_rows} rows of {first} set to the mean of the others the loss of the same batch is {loss}, it was "
        "{was}: the model knows these rows, or does not use them.",
        "把 {first} 的 {num_rows} 行设为其余行的平均值后，同一批的损失为 {loss}，原为 {was}："
        "模型认得这些行，或者没有用到它们。",
    ),
}
MIN_SHARE = 0.05
"""Of the probability: what is less is not worth a change of weights."""
_MAX_NAMED = 8


def wanted(case: Case) -> bool:
    """The look before the first step found such rows."""
    return case.trigger is Trigger.SILENT and case.finding.code == HOT_ROWS.code


def run(lab: Lab, case: Case) -> Findings:  # noqa: ARG001
    """The batch at hand with the rows as they are, and as they should be. Raises NotPossible, BudgetSpent."""
    found = of_rows(lab.port.model)
    if found is None:
        raise NotPossible("no row of a trained table is out of proportion")
    was = lab.shoot().reading.loss
    with found.in_place():
        shot = lab.shoot()
    loss, (first, table, rows) = shot.reading.loss, _worst(found)
    fair = len(rows) / len(table)
    good = not shot.bad and is_owed_back(was, loss, fair)
    numbers: dict[str, Any] = {"tables": list(found.names), "first": first, "num_rows": len(rows)}
    numbers |= {"tokens": list(rows[:_MAX_NAMED]), "was": was, "loss": loss, "fair_share": fair}
    return evidence("mean_rows", good, **numbers), tuple(_suspects(found)) if good else ()


def is_owed_back(was: float, loss: float, fair: float) -> bool:
    """The loss falls so far that the rows took more than their fair share of the probability. NaN: it does not."""
    if not math.isfinite(loss):
        return False
    return not math.isfinite(was) or 1.0 - math.exp(min(0.0, loss - was)) > max(fair, MIN_SHARE)


def _worst(found: Repair) -> tuple[str, torch.Tensor, tuple[int, ...]]:
    """The table that the finding is about."""
    place = found.names.index(found.finding.where)
    return found.names[place], found.wrong[place], found.rows[place]


def _suspects(found: Repair) -> list[Suspect]:
    told = []
    for name, table, rows in zip(found.names, found.wrong, found.rows, strict=True):
        longest = table.detach()[rows[0]].float()
        data = {"what": "row_norm", "row": rows[0], "rows": list(rows[:_MAX_NAMED]), "num_rows": len(rows)}
        told.append(Suspect("parameter", name, {**data, "amax": float(longest.abs().amax()), "from_the_start": True}))
    return sorted(told, key=lambda s: s.name != found.finding.where)
