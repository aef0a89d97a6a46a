"""Held-out loss: mean over supervised tokens, in the training precision, leaving no trace."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from finitune.data.collate import Batch
from finitune.numerics.seeds import generators_kept, seed_generators
from finitune.train.observer import EvalEvent
from finitune.train.step import Parts, on_device


def evaluate(parts: Parts, batches: Sequence[Batch], step: int) -> EvalEvent:
    """Mean loss over the supervised tokens of ``batches``.

    Dropout is off; what a model draws all the same is seeded apart. Training goes on bit for bit as if it had
    not been evaluated. A non-finite loss is returned as it is.
    """
    started_s = time.perf_counter()
    was_training = parts.model.training
    parts.model.eval()
    try:
        with generators_kept():
            total, count = _sum(parts, batches, step)
    finally:
        parts.model.train(was_training)
    loss = total / count if count else float("nan")
    rows = sum(len(b.row_ids) for b in batches)
    return EvalEvent(step, loss, rows, count, time.perf_counter() - started_s)


def _sum(parts: Parts, batches: Sequence[Batch], step: int) -> tuple[float, int]:
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    with torch.no_grad(), parts.context():
        for index, batch in enumerate(batches):
            seed_generators(parts.seed, step, index, parts.strategy.rank, stream="eval")
            done = parts.objective.compute(
                parts.model, parts.family, on_device(parts, batch), factor=1.0, chunk_tokens=parts.chunk_tokens
            )
            total += done.loss_sum.double().cpu()
            count += batch.num_supervised
    return float(total), count
