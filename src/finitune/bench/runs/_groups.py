"""Groups of answers to one prompt, each with a reward: the rows of policy gradients.

A batch has ``input_ids``, ``labels`` (prompt and padding -100), ``attention_mask`` (B, T), ``rewards`` (B,) float32
and ``groups`` (B,) int64; the rows of a group stand next to each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finitune.bench.runs import _text
from finitune.bench.runs._pairs import IGNORED, PROMPT_TOKENS

GROUPS_PER_BATCH, ROWS_PER_GROUP = 2, 4
_NUM_GROUPS = 60

Group = list[tuple[Tensor, float]]
"""Token ids (T,) with the prompt, and the reward."""


def groups_of(seed: int, count: int = _NUM_GROUPS) -> list[Group]:
    """Of each group the first answer is right; in the others more and more of the tokens are wrong."""
    generator = torch.Generator().manual_seed(seed + 4)
    groups = []
    for ids in _text.rows_of(seed, count):
        group = [(ids, 1.0)]
        for number in range(1, ROWS_PER_GROUP):
            end = int(torch.randint(PROMPT_TOKENS + 2, len(ids) + 1, (), generator=generator))
            wrong = torch.randint(_text.FIRST, _text.FIRST + 50, (end,), generator=generator)
            changed = torch.rand(end, generator=generator) < number / (ROWS_PER_GROUP - 1)
            changed[:PROMPT_TOKENS] = False
            changed[-1] = True
            answer = torch.where(changed, wrong, ids[:end])
            right = (answer == ids[:end])[PROMPT_TOKENS:].float().mean()
            group.append((answer, float(right)))
        groups.append(group)
    return groups


def collate(groups: list[Group]) -> dict[str, Any]:
    """See the top of the module."""
    rows = [row for group in groups for row, _ in group]
    batch = _text.collate(rows)
    batch["labels"][:, :PROMPT_TOKENS] = IGNORED
    batch["rewards"] = torch.tensor([reward for group in groups for _, reward in group])
    batch["groups"] = torch.tensor([place for place, group in enumerate(groups) for _ in group])
    return batch


def names(group: str) -> list[str]:
    """``rows.jsonl:3`` of a group -> the names of its rows, each line of the file being one answer."""
    source, _, number = group.rpartition(":")
    first = (int(number) - 1) * ROWS_PER_GROUP + 1
    return [f"{source}:{first + i}" for i in range(ROWS_PER_GROUP)]


def held_out(seed: int) -> list[Any]:
    """Four batches of eight right answers that no run trains on, without rewards."""
    rows = _text.rows_of(10_000 + seed, 32)
    batches = [_text.collate(rows[i : i + 8]) for i in range(0, 32, 8)]
    for batch in batches:
        batch["labels"][:, :PROMPT_TOKENS] = IGNORED
    return batches
