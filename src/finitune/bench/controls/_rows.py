"""Other rows for a text run: what a control changes is mostly the data."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from finitune.bench.runs._text import FIRST, ROWS_PER_BATCH, VOCAB, collate, epochs
from finitune.bench.workload import Workload


def train_on(load: Workload, rows: Sequence[Tensor], seed: int, per_batch: int = ROWS_PER_BATCH) -> None:
    """The run trains on these rows from now on, in epochs, for as many steps as before."""
    load.batches, load.rows = epochs(list(rows), len(load.batches), seed, collate, per_batch)


def rows_in(load: Workload) -> dict[str, Tensor]:
    """The rows of the run by name, in the order in which they first come up."""
    found: dict[str, Tensor] = {}
    for step, names in enumerate(load.rows, 1):
        for name, ids in zip(names, load.row_ids(step), strict=True):
            found.setdefault(name, ids)
    return found


def noise(random: Random, length: int) -> Tensor:
    """A row of random tokens: nothing in it can be learnt."""
    return torch.tensor([random.randrange(FIRST, VOCAB) for _ in range(length)])


def shuffled(random: Random, row: Tensor, share: float) -> Tensor:
    """A row of which a share of the tokens is random."""
    ids = row.clone()
    for place in range(len(ids)):
        if random.random() < share:
            ids[place] = random.randrange(FIRST, VOCAB)
    return ids
