"""Rows that a tiny model can learn: arithmetic sequences of tokens of different lengths, padded on the right.

All text runs draw from it. A data set of rows is shuffled anew in every epoch, so a bad row comes up again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

VOCAB, PAD, FIRST = 96, 0, 10
NUM_ROWS, ROWS_PER_BATCH = 120, 4
_TOKENS = 50
"""Tokens that rows are made of, from FIRST on; few further ones come up in a single row each."""
_RARE_SHARE = 0.1


def rows_of(seed: int, count: int = NUM_ROWS) -> list[Tensor]:
    """Token ids of ``count`` rows, 8 to 18 long; about a tenth hold one token that no other row has."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    rows = []
    for number in range(count):
        ids = FIRST + (draw(0, _TOKENS) + draw(1, 4) * torch.arange(draw(8, 19))) % _TOKENS
        if number % round(1 / _RARE_SHARE) == 3:
            ids[draw(2, len(ids))] = FIRST + _TOKENS + (number // round(1 / _RARE_SHARE)) % (VOCAB - FIRST - _TOKENS)
        rows.append(ids)
    return rows


def collate(rows: list[Tensor]) -> dict[str, Any]:
    """Ids, labels and attention mask, each (B, T) int64."""
    width = max(len(r) for r in rows)
    ids = torch.full((len(rows), width), PAD)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
    real = ids != PAD
    return {"input_ids": ids, "labels": torch.where(real, ids, -100), "attention_mask": real.long()}


def epochs(
    rows: list[Any], steps: int, seed: int, make: Callable[[list[Any]], Any], per_batch: int = ROWS_PER_BATCH
) -> tuple[list[Any], list[list[str]]]:
    """Batches of ``steps`` steps with the names of their rows, in an order shuffled anew every epoch."""
    generator = torch.Generator().manual_seed(seed + 1)
    order: list[int] = []
    batches, names = [], []
    for _ in range(steps):
        if len(order) < per_batch:
            order = torch.randperm(len(rows), generator=generator).tolist()
        taken, order = order[:per_batch], order[per_batch:]
        batches.append(make([rows[i] for i in taken]))
        names.append([f"rows.jsonl:{i + 1}" for i in taken])
    return batches, names


def held_out(seed: int, make: Callable[[list[Any]], Any] = collate) -> list[Any]:
    """Four batches of eight rows that no run trains on."""
    rows = rows_of(10_000 + seed, 32)
    return [make(rows[i : i + 8]) for i in range(0, 32, 8)]
