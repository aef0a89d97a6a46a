"""Full fine-tuning of a pretrained tiny Llama whose weights, gradients and moments are bf16, at a rate they can bear.

In fp32 it is the same run with fp32 weights.
"""

from __future__ import annotations

import torch

from finitune.bench.runs import _base, _text
from finitune.bench.runs.llama_sft import loss
from finitune.bench.workload import Workload

PRECISIONS = ("fp32", "bf16")
STEPS = 60
LR = 1e-3


def build(seed: int, precision: str, steps: int = STEPS) -> Workload:
    """The healthy run: an update of 1e-3 is well above half a bf16 step of weights around 0.1."""
    model = _base.pretrained_llama(seed)
    if precision == "bf16":
        model.to(torch.bfloat16)
    batches, names = _text.epochs(_text.rows_of(seed), steps, seed, _text.collate)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    return Workload("half_weights", precision, model, optimizer, loss, batches, names, _text.held_out(seed))
