"""Full fine-tuning of a small vision-language model: an image that shows how a sequence of tokens begins and goes on.

A patch encoder with two blocks, a projector and a Llama with two layers, all of width 32; AdamW, clipping at 1, four
rows a step. A row is its text and an image of 3 x 8 x 8 numbers around 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finitune.bench.runs import _text
from finitune.bench.runs._vision import COLOURS, SIDE, tiny_vision
from finitune.bench.workload import Batch, Workload

PRECISIONS = ("fp32", "bf16", "fp16")
STEPS = 60
LR = 3e-3
_NOISE = 0.1
_PATTERNS_SEED = 11
"""The patterns mean the same in every run; held-out rows have other noise."""

Row = tuple[Tensor, Tensor]
"""Token ids (T,) and image (C, side, side)."""


def build(seed: int, precision: str, steps: int = STEPS) -> Workload:
    """The healthy run."""
    model = tiny_vision(seed, _text.VOCAB)
    batches, names = _text.epochs(_rows(seed), steps, seed, collate)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    apart = _rows(10_000 + seed, 32)
    held_out = [collate(apart[i : i + 8]) for i in range(0, 32, 8)]
    load = Workload("vl_stub", precision, model, optimizer, loss, batches, names, held_out)
    load.decoder = "language.model"
    return load


def loss(model: Any, batch: Batch) -> Tensor:
    """Mean over supervised tokens."""
    mean: Tensor = model(**batch)
    return mean


def collate(rows: list[Row]) -> dict[str, Any]:
    """Text as in every run, and ``pixel_values`` (B, C, side, side) float32."""
    return {**_text.collate([ids for ids, _ in rows]), "pixel_values": torch.stack([image for _, image in rows])}


def _rows(seed: int, count: int = _text.NUM_ROWS) -> list[Row]:
    """Each image is the pattern of its row's first token and that of the distance to the second, with noise."""
    patterns = torch.randn(2, _text.VOCAB, COLOURS, SIDE, SIDE, generator=torch.Generator().manual_seed(_PATTERNS_SEED))
    noise = torch.Generator().manual_seed(seed + 2)
    rows = []
    for ids in _text.rows_of(seed, count):
        first, distance = int(ids[0]), int(ids[1] - ids[0]) % _text.VOCAB
        image = (patterns[0, first] + patterns[1, distance]) / 2**0.5
        rows.append((ids, image + _NOISE * torch.randn(image.shape, generator=noise)))
    return rows
