"""Full fine-tuning of a tiny Llama on two processes: DistributedDataParallel over gloo, two rows a step on each.

A step is written down as two micro-batches, one for each rank. The gradient that the ranks exchange is the mean of
theirs, which is what a plain loop on one process makes of the two micro-batches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finitune.bench.runs import _text
from finitune.bench.runs.llama_sft import loss
from finitune.bench.workload import Workload
from finitune.models.tiny import tiny_llama

NEEDS = ("ranks",)
PRECISIONS = ("fp32",)
STEPS = 40
LR = 3e-3
NUM_RANKS = 2


def build(seed: int, precision: str, steps: int = STEPS) -> Workload:
    """The healthy run."""
    model = tiny_llama(seed, hidden=32, layers=2, heads=2, kv_heads=2, mlp=64, vocab=_text.VOCAB)
    batches, names = _text.epochs(_text.rows_of(seed), steps, seed, by_rank)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    return Workload("gloo_sft", precision, model, optimizer, loss, batches, names, _text.held_out(seed))


def by_rank(rows: list[Tensor]) -> list[dict[str, Any]]:
    """The rows of a step, one batch a rank."""
    size = len(rows) // NUM_RANKS
    return [_text.collate(rows[i : i + size]) for i in range(0, len(rows), size)]
