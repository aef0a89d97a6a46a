"""A policy gradient with groups, as in GRPO, of a tiny Llama: answers from a buffer, their log-probabilities renewed.

Per prompt a group of answers, some right; advantage = (reward - mean of the group) / (std of the group + eps); per
token -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) with ratio = exp(log pi - log pi_old), and the mean over the answer
tokens of the batch; Shao et al. 2024 (arXiv 2402.03300), equation 3, without the KL term. Every few steps the
log-probabilities of the coming answers are taken anew from the policy, as a roll-out does; in fp32 from the logits on.
Two groups of four rows a step, AdamW, clipping at 1. Held-out batches measure the likelihood of right answers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from finitune.bench.runs import _groups, _text
from finitune.bench.runs._pairs import IGNORED, token_logps
from finitune.bench.workload import Batch, Workload
from finitune.models.tiny import tiny_llama

PRECISIONS = ("fp32", "bf16", "fp16")
STEPS = 60
LR = 3e-3
CLIP = 0.2
ROLL_OUT_STEPS = 4
STD_FLOOR = 1e-4


def build(seed: int, precision: str, steps: int = STEPS) -> Workload:
    """The healthy run."""
    model = tiny_llama(seed, hidden=32, layers=2, heads=2, kv_heads=2, mlp=64, vocab=_text.VOCAB)
    groups = _groups.groups_of(seed)
    batches, numbers = _text.epochs(groups, steps, seed, _groups.collate, _groups.GROUPS_PER_BATCH)
    names = [[name for group in step for name in _groups.names(group)] for step in numbers]
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    load = Workload("policy_gradient", precision, model, optimizer, loss, batches, names, _groups.held_out(seed))
    roll_out(load, 0)
    for step in range(ROLL_OUT_STEPS, steps, ROLL_OUT_STEPS):
        load.between(step, partial(roll_out, load, step))
    return load


def roll_out(load: Workload, after_step: int) -> None:
    """Note what the policy as it is now gives the answers of the next steps."""
    for batch in load.batches[after_step : after_step + ROLL_OUT_STEPS]:
        with torch.no_grad(), load.context():
            batch["old_logps"] = _logps(load.model, batch)[0]


def loss(model: Any, batch: Batch) -> Tensor:
    """See the top of the module."""
    logps_BT, there_BT = _logps(model, batch)
    if "old_logps" not in batch:
        return -(logps_BT * there_BT).sum() / there_BT.sum()
    ratio_BT = torch.exp(logps_BT - batch["old_logps"])
    advantage_B1 = advantages(batch["rewards"], batch["groups"])[:, None]
    gain_BT = torch.minimum(ratio_BT * advantage_B1, ratio_BT.clamp(1 - CLIP, 1 + CLIP) * advantage_B1)
    return -(gain_BT * there_BT).sum() / there_BT.sum().clamp(min=1)


def advantages(rewards_B: Tensor, groups_B: Tensor) -> Tensor:
    """(reward - mean) / (std + floor) inside each group, (B,)."""
    out_B = torch.zeros_like(rewards_B)
    for group in set(groups_B.tolist()):
        mine_B = groups_B == group
        own = rewards_B[mine_B]
        out_B[mine_B] = (own - own.mean()) / (own.std() + STD_FLOOR)
    return out_B


def _logps(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of every token, padding among them, and which of them count; both (B, T - 1)."""
    logps_BT, _ = token_logps(model, batch["input_ids"], batch["input_ids"], batch["attention_mask"])
    return logps_BT, batch["labels"][:, 1:] != IGNORED
