"""Full fine-tuning of a tiny Llama that has learnt from other rows before: there is something to lose.

As ``llama_sft``, after 100 plain steps of pretraining.
"""

from __future__ import annotations

import torch

from finitune.bench.runs import _base, _text
from finitune.bench.runs.llama_sft import loss
from finitune.bench.workload import Workload

PRECISIONS = ("fp32", "bf16", "fp16")
STEPS = 60
LR = 1e-3


def build(seed: int, precision: str, steps: int = STEPS) -> Workload:
    """The healthy run."""
    model = _base.pretrained_llama(seed)
    batches, names = _text.epochs(_text.rows_of(seed), steps, seed, _text.collate)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    return Workload("pretrained_sft", precision, model, optimizer, loss, batches, names, _text.held_out(seed))
