"""Rows of the vocabulary: those that are far longer than the others, brought down to the usual length for one replay.

What it changes:
    Rows of the embedding and of the output head (which every logit sum uses) that are more than 10 times as long as the
    median row. They are scaled to its length, and put back.

What each outcome says:
    GOOD: the failure goes away, or a loss far above that of guessing comes down to it: these rows are at fault, and the
    tokens that use them are told.
    BAD: no row is out of scale, or the failure stays.

What it costs:
    A norm of each row; one replay where some are out of scale, none where not.

Source:
    Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from finitune.core.incident import Result, Suspect, Trigger, Words
from finitune.engine.case import Case
from finitune.engine.experiments._tools import Findings, evidence, is_settled
from finitune.engine.experiments._updates import standing_before_it
from finitune.engine.lab import Lab

ORDER = 45
COST = 1.0
SAYS = {
    Result.GOOD: Words(
        "With {num_rows} rows of {first} at the usual length (tokens {tokens}; up to {times} times the median) the "
        "failure is gone (loss {loss}).",
        "把 {first} 的 {num_rows} 行（词元 {tokens}；最大为中位数的 {times} 倍）缩至通常长度后，"
        "故障消失（损失 {loss}）。",
    ),
    Result.BAD: Words(
        "No row of the vocabulary explains the failure ({num_rows} rows out of scale).",
        "词表中没有哪一行能解释该故障（尺度异常的行：{num_rows}）。",
    ),
}
LIMIT = 10.0
"""Rows of trained vocabularies are within a factor of 3 or so of the median; untrained ones are shorter."""
_MAX_SHARE = 0.05
_MIN_ROWS = 16
_MAX_NAMED = 8
ABOVE_GUESSING = 1.5
"""A loss above this many times ln(rows): an untrained model does better."""


def wanted(case: Case) -> bool:
    """A step fails or has a loss far off, and the state holds no bad value."""
    return (
        case.trigger not in (Trigger.UPDATE, Trigger.FORECAST) and not case.bad("scan_state") and not is_settled(case)
    )


@dataclass(frozen=True, slots=True)
class _Table:
    """An embedding or output head with rows out of scale."""

    name: str
    weight: nn.Parameter
    rows: tuple[int, ...]
    """The longest first."""
    norms: tuple[float, ...]
    usual: float


def run(lab: Lab, case: Case) -> Findings:
    """Look, and try. Raises NotPossible where there is no batch, BudgetSpent."""
    if case.trigger is not Trigger.RUNAWAY:
        return _tried(lab, case)
    with standing_before_it(lab, case):  # the batch of the step that was committed
        return _tried(lab, case)


def _tried(lab: Lab, case: Case) -> Findings:
    tables = list(_out_of_scale(lab))
    if not tables:
        return evidence("vocabulary_rows", False, num_rows=0, tables=[]), ()
    with _at_usual_length(tables):
        shot = lab.shoot()
    worst = max(tables, key=lambda t: t.norms[0] / t.usual)
    guessing = math.log(len(worst.weight))
    good = not shot.bad and _is_cured(case, shot.reading.loss, guessing)
    numbers: dict[str, Any] = {
        "tables": [t.name for t in tables],
        "first": worst.name,
        "num_rows": len(worst.rows),
        "tokens": list(worst.rows[:_MAX_NAMED]),
        "times": worst.norms[0] / worst.usual,
        "loss": shot.reading.loss,
        "guessing": guessing,
    }
    return evidence("vocabulary_rows", good, **numbers), tuple(map(_suspect, tables)) if good else ()


def _is_cured(case: Case, loss: float, guessing: float) -> bool:
    """It does not fail any more; where the failure is only a loss, it comes down from far above that of guessing."""
    was = case.reading.loss
    if case.trigger in (Trigger.RUNAWAY, Trigger.SILENT):
        return was > ABOVE_GUESSING * guessing and loss < was / ABOVE_GUESSING
    return True


def _suspect(table: _Table) -> Suspect:
    data = {
        "what": "row_norm",
        "row": table.rows[0],
        "rows": list(table.rows[:_MAX_NAMED]),
        "num_rows": len(table.rows),
        "amax": float(table.weight.detach()[table.rows[0]].abs().amax()),
        "norm": table.norms[0],
        "median_norm": table.usual,
    }
    return Suspect("parameter", table.name, data)


def _out_of_scale(lab: Lab) -> Iterator[_Table]:
    for name, weight in _tables(lab.port.model):
        norms_V = torch.linalg.vector_norm(weight.detach(), dim=1, dtype=torch.float32)
        finite_V = torch.isfinite(norms_V)
        usable_V = norms_V[finite_V & (norms_V > 0)]
        if len(usable_V) < _MIN_ROWS:
            continue
        usual = float(usable_V.median())
        long_V = finite_V & (norms_V > LIMIT * usual)
        if int(long_V.sum()) > _MAX_SHARE * len(norms_V):
            continue
        rows = sorted(long_V.nonzero().flatten().tolist(), key=lambda t: -float(norms_V[t]))
        if rows:
            yield _Table(name, weight, tuple(rows), tuple(float(norms_V[t]) for t in rows), usual)


def _tables(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Embeddings, and what the model calls its output head; a shared weight once."""
    seen: set[int] = set()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        fits = isinstance(module, nn.Embedding) or (head is not None and module is head)
        if fits and isinstance(weight, nn.Parameter) and weight.dim() == 2 and id(weight) not in seen:
            seen.add(id(weight))
            yield f"{name}.weight", weight


@contextmanager
def _at_usual_length(tables: list[_Table]) -> Iterator[None]:
    held = [table.weight.detach()[list(table.rows)].clone() for table in tables]
    try:
        with torch.no_grad():
            for table, rows in zip(tables, held, strict=True):
                factors = torch.tensor([table.usual / n for n in table.norms], device=rows.device)
                table.weight[list(table.rows)] = (rows.float() * factors[:, None]).to(rows.dtype)
        yield
    finally:
        with torch.no_grad():
            for table, rows in zip(tables, held, strict=True):
                table.weight[list(table.rows)] = rows
