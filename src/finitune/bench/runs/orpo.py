"""Odds ratio preference optimisation of a tiny Llama, as a bare loop.

Loss: mean negative log-likelihood of the chosen answers + lambda times -log sigmoid(log odds(w) - log odds(l)), where
odds(y) = p / (1 - p) and log p is the mean over the tokens of the answer; Hong et al. 2024 (arXiv 2403.07691),
equations 6 and 7, in fp32 from the logits on. Two decoder layers of width 32, AdamW, clipping at 1, four pairs a step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finitune.bench.runs import _pairs, _text
from finitune.bench.workload import Batch, Workload
from finitune.models.tiny import tiny_llama

PRECISIONS = ("fp32", "bf16", "fp16")
STEPS = 60
LR = 3e-3
LAMBDA = 0.1


def build(seed: int, precision: str, steps: int = STEPS) -> Workload:
    """The healthy run."""
    model = tiny_llama(seed, hidden=32, layers=2, heads=2, kv_heads=2, mlp=64, vocab=_text.VOCAB)
    batches, names = _text.epochs(_pairs.pairs_of(seed), steps, seed, _pairs.collate)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    return Workload("orpo", precision, model, optimizer, loss, batches, names, _pairs.held_out(seed))


def loss(model: Any, batch: Batch) -> Tensor:
    """See the top of the module."""
    chosen_B, rejected_B, num_chosen_B, num_rejected_B = _pairs.answer_logps(model, batch)
    mean_chosen_B, mean_rejected_B = chosen_B / num_chosen_B.clamp(min=1), rejected_B / num_rejected_B.clamp(min=1)
    log_odds_B = log_odds(mean_chosen_B) - log_odds(mean_rejected_B)
    likelihood = -chosen_B.sum() / num_chosen_B.sum().clamp(min=1)
    return likelihood - LAMBDA * F.logsigmoid(log_odds_B).mean()


def log_odds(logp_B: Tensor) -> Tensor:
    """log(p / (1 - p)) as the reference code writes it: log1p(-exp(log p)); log p is below 0."""
    return logp_B - torch.log1p(-torch.exp(logp_B))
