"""Full fine-tuning of a tiny Llama on token sequences: the plainest run there is.

Two decoder layers of width 32, AdamW, clipping at 1, a constant learning rate, four rows a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finitune.bench.runs import _text
from finitune.bench.workload import Batch, Workload
from finitune.models.tiny import tiny_llama

PRECISIONS = ("fp32", "bf16", "fp16")
STEPS = 60
LR = 3e-3


def build(seed: int, precision: str, steps: int = STEPS) -> Workload:
    """The healthy run."""
    model = tiny_llama(seed, hidden=32, layers=2, heads=2, kv_heads=2, mlp=64, vocab=_text.VOCAB)
    batches, names = _text.epochs(_text.rows_of(seed), steps, seed, _text.collate)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    return Workload("llama_sft", precision, model, optimizer, loss, batches, names, _text.held_out(seed))


def loss(model: Any, batch: Batch) -> Tensor:
    """The model's own mean over supervised tokens."""
    mean: Tensor = model(**batch, use_cache=False).loss
    return mean
