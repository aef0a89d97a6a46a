"""Full fine-tuning of a tiny InternLM2, converted from InternLM2's own checkpoint layout.

Two decoder layers of width 32 with grouped key and value heads, AdamW, clipping at 1, four rows a step.
"""

from __future__ import annotations

import torch

from finitune.bench.runs import _text
from finitune.bench.runs.llama_sft import LR, loss
from finitune.bench.workload import Workload
from finitune.models.tiny import tiny_internlm2

PRECISIONS = ("fp32", "bf16", "fp16")
STEPS = 60


def build(seed: int, precision: str, steps: int = STEPS) -> Workload:
    """The healthy run."""
    model = tiny_internlm2(seed, hidden=32, layers=2, heads=4, kv_heads=2, mlp=64, vocab=_text.VOCAB)
    batches, names = _text.epochs(_text.rows_of(seed), steps, seed, _text.collate)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    return Workload("internlm2_sft", precision, model, optimizer, loss, batches, names, _text.held_out(seed))
