"""Pairs of answers, one better than the other: the rows of preference losses.

A row is a prompt of a few tokens, the answer that goes on as the prompt began (chosen), and one that does not
(rejected). A batch has ``input_ids``, ``labels`` (prompt and padding -100) and ``attention_mask`` of the chosen side,
and the same three under ``rejected``; all are (B, T) with one width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finitune.bench.runs import _text

PROMPT_TOKENS = 4
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids, each (T,), both with the prompt."""

    chosen: Tensor
    rejected: Tensor


def pairs_of(seed: int, count: int = _text.NUM_ROWS) -> list[Pair]:
    """Rows of text whose rejected answer has tokens at random, and another length."""
    generator = torch.Generator().manual_seed(seed + 3)
    pairs = []
    for ids in _text.rows_of(seed, count):
        length = int(torch.randint(2, len(ids) - PROMPT_TOKENS + 1, (), generator=generator))
        wrong = torch.randint(_text.FIRST, _text.FIRST + 50, (length,), generator=generator)
        pairs.append(Pair(ids, torch.cat([ids[:PROMPT_TOKENS], wrong])))
    return pairs


def collate(pairs: list[Pair]) -> dict[str, Any]:
    """See the top of the module."""
    width = max(len(ids) for pair in pairs for ids in (pair.chosen, pair.rejected))
    return {**_side([p.chosen for p in pairs], width), "rejected": _side([p.rejected for p in pairs], width)}


def _side(rows: list[Tensor], width: int) -> dict[str, Tensor]:
    ids_BT = torch.full((len(rows), width), _text.PAD)
    for place, row in enumerate(rows):
        ids_BT[place, : len(row)] = row
    real_BT = ids_BT != _text.PAD
    labels_BT = torch.where(real_BT, ids_BT, IGNORED)
    labels_BT[:, :PROMPT_TOKENS] = IGNORED
    return {"input_ids": ids_BT, "labels": labels_BT, "attention_mask": real_BT.long()}


def held_out(seed: int) -> list[Any]:
    """Four batches of eight pairs that no run trains on."""
    pairs = pairs_of(10_000 + seed, 32)
    return [collate(pairs[i : i + 8]) for i in range(0, 32, 8)]


def answer_logps(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of both answers from one forward pass, in fp32.

    Returns sums of the chosen (B,) and the rejected (B,), and the numbers of their tokens (B,) each.
    """
    both = {k: torch.cat([batch[k], batch["rejected"][k]]) for k in ("input_ids", "labels", "attention_mask")}
    logps_BT, there_BT = token_logps(model, both["input_ids"], both["labels"], both["attention_mask"])
    sums, counts = logps_BT.sum(1), there_BT.sum(1)
    rows = len(batch["input_ids"])
    return sums[:rows], sums[rows:], counts[:rows], counts[rows:]


def token_logps(model: Any, ids_BT: Tensor, labels_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of every labelled token, 0 elsewhere, and where there is a label; both (B, T - 1)."""
    logits = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    targets = labels_BT[:, 1:]
    there = targets != IGNORED
    logps = logits[:, :-1].float().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return logps * there, there
