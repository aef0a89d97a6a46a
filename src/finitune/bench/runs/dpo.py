"""Direct preference optimisation of a tiny Llama against its own frozen beginning, as a bare loop.

Loss: -log sigmoid(beta (log pi(w)/ref(w) - log pi(l)/ref(l))), Rafailov et al. 2023 (arXiv 2305.18290), equation 7, in
fp32 from the logits on. Two decoder layers of width 32, AdamW, clipping at 1, four pairs a step.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finitune.bench.runs import _pairs, _text
from finitune.bench.workload import Batch, LossFn, Workload
from finitune.models.tiny import tiny_llama

PRECISIONS = ("fp32", "bf16", "fp16")
STEPS = 60
LR = 1e-3
BETA = 0.1


def build(seed: int, precision: str, steps: int = STEPS) -> Workload:
    """The healthy run."""
    model = tiny_llama(seed, hidden=32, layers=2, heads=2, kv_heads=2, mlp=64, vocab=_text.VOCAB)
    loss = against(copy.deepcopy(model).requires_grad_(False))
    batches, names = _text.epochs(_pairs.pairs_of(seed), steps, seed, _pairs.collate)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    return Workload("dpo", precision, model, optimizer, loss, batches, names, _pairs.held_out(seed))


def against(reference: Any) -> LossFn:
    """The loss with a frozen reference policy."""

    def loss(model: Any, batch: Batch) -> Tensor:
        chosen_B, rejected_B, _, _ = _pairs.answer_logps(model, batch)
        with torch.no_grad():
            old_chosen_B, old_rejected_B, _, _ = _pairs.answer_logps(reference, batch)
        margin_B = (chosen_B - old_chosen_B) - (rejected_B - old_rejected_B)
        return -F.logsigmoid(BETA * margin_B).mean()

    return loss
