"""A policy gradient on the policy's own answers, as GRPO trains: every few steps they are sampled anew.

A tiny Llama that has learnt from rows of the same kind before. Two prompts a step, of each a group of eight answers
drawn from the policy at temperature 1; the reward is the share of tokens that go on as the prompt began. Advantage and
objective are those of ``policy_gradient``, whose answers come from a fixed buffer: that is sound for some dozens of
steps, until the wrong ones, which the policy would never give any more, have ratios of 1e10. Here the plain loop gets
better for as long as one likes. AdamW, clipping at 1. Held-out batches measure the reward that is missed on average.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finitune.bench.runs import _base, _text, policy_gradient
from finitune.bench.runs._groups import held_out
from finitune.bench.runs._pairs import IGNORED, PROMPT_TOKENS, token_logps
from finitune.bench.runs.policy_gradient import ROLL_OUT_STEPS, roll_out
from finitune.bench.workload import Batch, Workload

PRECISIONS = ("fp32", "bf16", "fp16")
STEPS = 160
LR = 5e-4
GROUPS_PER_BATCH, ROWS_PER_GROUP = 2, 8
_TOKENS = 50
"""Tokens that rows are made of (``_text``)."""


def build(seed: int, precision: str, steps: int = STEPS) -> Workload:
    """The healthy run."""
    batches, _ = _text.epochs(_text.rows_of(seed), steps, seed, _collate, GROUPS_PER_BATCH)
    # The answers of a prompt are others in every epoch, and so are their names.
    names = [[f"answers-{s}.jsonl:{i + 1}" for i in range(len(b["rewards"]))] for s, b in enumerate(batches, 1)]
    model = _base.pretrained_llama(seed)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    load = Workload("roll_outs", precision, model, optimizer, loss, batches, names, held_out(seed))
    sample(load, seed, 0)
    for step in range(ROLL_OUT_STEPS, steps, ROLL_OUT_STEPS):
        load.between(step, partial(sample, load, seed, step))
    return load


def loss(model: Any, batch: Batch) -> Tensor:
    """That of ``policy_gradient``; of a batch without answers, one minus the mean probability of a right token."""
    if "old_logps" in batch:
        return policy_gradient.loss(model, batch)
    logps_BT, there_BT = token_logps(model, batch["input_ids"], batch["labels"], batch["attention_mask"])
    return 1.0 - (logps_BT.exp() * there_BT).sum() / there_BT.sum()


def sample(load: Workload, seed: int, after_step: int) -> None:
    """Answers of the policy as it is now, and what it gives them, for the next steps."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + after_step)
    coming = load.batches[after_step : after_step + ROLL_OUT_STEPS]
    drawn = _answers(load, [batch["input_ids"] for batch in coming], generator)
    for batch, ids_BT in zip(coming, drawn, strict=True):
        there_BT = batch["labels"] != IGNORED
        batch["input_ids"] = torch.where(there_BT, ids_BT, batch["input_ids"])
        batch["labels"] = torch.where(there_BT, ids_BT, IGNORED)
        batch["rewards"] = rewards(batch)
    roll_out(load, after_step)


def rewards(batch: Batch) -> Tensor:
    """Share of the answer's tokens that go on from the one before as the prompt began, (B,).

    Where ``least`` (B,) is above 0: 1 for a share of at least so much, 0 for less.
    """
    place_BT = batch["input_ids"] - _text.FIRST
    step_B1 = place_BT[:, 1:2] - place_BT[:, :1]
    right_BT = (place_BT[:, :-1] + step_B1) % _TOKENS == place_BT[:, 1:]
    there_BT = batch["labels"][:, 1:] != IGNORED
    share_B = (right_BT & there_BT).sum(1) / there_BT.sum(1)
    return torch.where(batch["least"] > 0, (share_B >= batch["least"]).float(), share_B)


def _collate(rows: list[Tensor]) -> Batch:
    """Prompts, each as often as its group has answers; in place of these are the right ones, until they are drawn."""
    batch: Batch = _text.collate([row for row in rows for _ in range(ROWS_PER_GROUP)])
    batch["labels"][:, :PROMPT_TOKENS] = IGNORED
    batch["groups"] = torch.arange(len(rows)).repeat_interleave(ROWS_PER_GROUP)
    batch["rewards"], batch["least"] = torch.zeros(2, len(batch["groups"]))
    return batch


def _answers(load: Workload, ids: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """What the policy writes after the prompts, token by token, in the shapes (B, T) of ``ids``.

    The model's mode is kept; what is drawn hangs on its weights and on the generator alone.
    """
    was, width = load.model.training, max(i.shape[1] for i in ids)
    ids_BT = torch.cat([F.pad(i, (0, width - i.shape[1])) for i in ids])
    load.model.eval()
    with torch.no_grad(), load.context():
        for place in range(PROMPT_TOKENS, width):
            logits_BV = load.model(input_ids=ids_BT[:, :place], use_cache=False).logits[:, -1].float()
            ids_BT[:, place] = torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)[:, 0]
    load.model.train(was)
    parts = torch.split(ids_BT, [len(i) for i in ids])
    return [part[:, : i.shape[1]] for part, i in zip(parts, ids, strict=True)]
