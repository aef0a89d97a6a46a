"""Full fine-tuning of a pretrained tiny Llama with SGD and momentum.

As ``pretrained_sft`` with another optimizer, whose update is as long as the gradient says.
"""

from __future__ import annotations

import torch

from finitune.bench.runs import _base, _text
from finitune.bench.runs.llama_sft import loss
from finitune.bench.workload import Workload

PRECISIONS = ("fp32", "bf16", "fp16")
STEPS = 60
LR, MOMENTUM = 0.05, 0.9


def build(seed: int, precision: str, steps: int = STEPS) -> Workload:
    """The healthy run."""
    model = _base.pretrained_llama(seed)
    batches, names = _text.epochs(_text.rows_of(seed), steps, seed, _text.collate)
    optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM)
    return Workload("pretrained_sgd", precision, model, optimizer, loss, batches, names, _text.held_out(seed))
