"""Full fine-tuning of a tiny Llama with gradient accumulation: four micro-batches of two rows a step.

The loss of a step is the mean over all its supervised tokens, however they fall on the micro-batches: each micro-batch
has the number of them all with it (``num_items``), as trainers do since the accumulation fix of 2024
(huggingface/transformers#34191). AdamW, clipping at 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finitune.bench.runs import _text
from finitune.bench.workload import Batch, Workload
from finitune.models.tiny import tiny_llama

PRECISIONS = ("fp32", "bf16", "fp16")
STEPS = 60
LR = 3e-3
MICROS, ROWS_PER_MICRO = 4, 2


def build(seed: int, precision: str, steps: int = STEPS) -> Workload:
    """The healthy run."""
    model = tiny_llama(seed, hidden=32, layers=2, heads=2, kv_heads=2, mlp=64, vocab=_text.VOCAB)
    rows, per_step = _text.rows_of(seed), MICROS * ROWS_PER_MICRO
    batches, names = _text.epochs(rows, steps, seed, micro_batches, per_step)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    held_out = _text.held_out(seed)
    load = Workload("accumulated_sft", precision, model, optimizer, loss, batches, names, held_out)
    load.guard_options["check_accumulation"] = True
    return load


def micro_batches(rows: list[Tensor], micros: int = MICROS) -> list[dict[str, Any]]:
    """The rows of a step in micro-batches of equal numbers of rows."""
    size = len(rows) // micros
    return counted([_text.collate(rows[i : i + size]) for i in range(0, len(rows), size)])


def counted(micros: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the number of targets of the whole step over that of micro-batches, () float32, in each of them."""
    targets = sum(int((m["labels"][:, 1:] != -100).sum()) for m in micros)
    for micro in micros:
        micro["num_items"] = torch.tensor(targets / len(micros))
    return micros


def loss(model: Any, batch: Batch) -> Tensor:
    """Sum over supervised tokens / (those of the step / micro-batches): the loop's mean over micro-batches is right."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    targets_BT = batch["labels"][:, 1:]
    total = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets_BT.flatten(), reduction="sum")
    count: Tensor = batch.get("num_items", (targets_BT != -100).sum())
    return total / count
