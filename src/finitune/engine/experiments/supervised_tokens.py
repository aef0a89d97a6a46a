"""Supervised tokens: how many tokens of the step count in the loss.

What it changes:
    Nothing; it counts.

What each outcome says:
    BAD: none counts. The loss over nothing is NaN or 0 and every gradient is 0: the prompt is cut off, the template
    does not match, or the answer is empty. Precision, rate and weights have no part in it.
    The rows of every micro-batch in which none counts are named, whatever the step as a whole has.
    GOOD: some count; the loss is a loss.

What it costs:
    Nothing.

Source:
    https://github.com/huggingface/trl/issues/6668 , https://github.com/ymcui/Chinese-LLaMA-Alpaca-2/issues/424
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from finitune.core.incident import Result, Suspect, Trigger, Words
from finitune.engine.case import Case
from finitune.engine.conditions import NotPossible
from finitune.engine.experiments._tools import Findings, evidence
from finitune.engine.lab import Lab
from finitune.engine.widen import IGNORED

ORDER = 20
COST = 0.0
SAYS = {
    Result.BAD: Words(
        "None of the {tokens} tokens of the step counts in the loss.",
        "该步的 {tokens} 个词元中没有一个计入损失。",
    ),
    Result.GOOD: Words(
        "{supervised} of {tokens} tokens of the step count in the loss.",
        "该步的 {tokens} 个词元中有 {supervised} 个计入损失。",
    ),
}


def wanted(case: Case) -> bool:
    """Always, as it is free. A forecast is not about one batch."""
    return case.trigger is not Trigger.FORECAST


def run(lab: Lab, case: Case) -> Findings:
    """Count: the labels of the batch, and what the trainer counted. Raises NotPossible where neither can be had."""
    labels = _labels_of(lab)
    own = sum(int((t != IGNORED).sum()) for t in labels if t is not None)
    counts = [n for n in (case.reading.supervised_tokens, own if _any(labels) else None) if n is not None]
    if not counts:
        raise NotPossible("the trainer does not count supervised tokens, and the batch has no labels")
    supervised = min(counts)
    empty = [m for m, t in enumerate(labels) if t is not None and not bool((t != IGNORED).any())]
    rows = _rows_of(lab, empty)
    numbers: dict[str, Any] = {"supervised": supervised, "tokens": case.reading.tokens, "empty_micros": empty}
    numbers |= {"empty_rows": [s.name for s in rows], "num_micros": len(labels)}
    return evidence("supervised_tokens", supervised > 0, **numbers), rows


def _labels_of(lab: Lab) -> list[torch.Tensor | None]:
    """The labels of each micro-batch, flat; None where it has none."""
    try:
        batch = lab.port.batch()
    except NotPossible:
        return []
    return [torch.cat([t.flatten() for t in found]) if (found := _labels(micro)) else None for micro in batch]


def _any(labels: list[torch.Tensor | None]) -> bool:
    return any(t is not None for t in labels)


def _rows_of(lab: Lab, micros: list[int]) -> tuple[Suspect, ...]:
    """The rows of micro-batches without a target."""
    try:
        units = lab.port.units() if micros else ()
    except NotPossible:
        return ()
    data = {
        "by": "supervised_tokens",
        "supervised": 0,
    }
    return tuple(
        Suspect("row", str(row), {**data, "micro": u.micro, "index": u.index, "num_in_unit": len(u.rows)})
        for u in units
        if u.micro in micros
        for row in u.rows
    )


def _labels(micro: Any) -> list[torch.Tensor]:
    """The tensors of whole numbers that are called labels."""
    if not isinstance(micro, Mapping):
        return []
    named = ((str(key).lower(), value) for key, value in micro.items())
    return [t for k, t in named if k.startswith("labels") and isinstance(t, torch.Tensor) and not t.is_floating_point()]
