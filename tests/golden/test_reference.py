"""The first 12 losses equal a plain PyTorch loop to 1e-6, and the stored ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from support.runs import loop_of, ready, steps_of

GOLDEN = Path(__file__).with_name("tiny_llama_fp32.json")
OVERRIDES = (
    "max_steps=12",
    "lr_scheduler_type=linear",
    "warmup_ratio=0.25",
    "weight_decay=0.1",
    "gradient_accumulation_steps=2",
)


def plain_losses(folder: Path) -> list[float]:
    """What anyone would write: full logits, cross entropy, clip, AdamW, linear warm-up and decay."""
    prepared = ready(folder, *OVERRIDES)
    model, loader = prepared.port.parts.model, prepared.port.parts.loader
    parameters = list(model.parameters())
    decayed = {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([decayed, {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}])
    cursor, losses = type(prepared.port.state.cursor)(), []
    model.train()
    for k in range(12):
        warm = (k + 1) / 4 if k < 3 else 1 - (k - 3) / 9
        batches = loader.at(cursor)
        cursor = loader.advance(cursor)
        total, count = 0.0, sum(int((b.labels_BT[:, 1:] != -100).sum()) for b in batches)
        for batch in batches:
            logits = model(input_ids=batch.ids_BT, attention_mask=batch.attention_mask).logits
            target = batch.labels_BT[:, 1:]
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), target.flatten(), reduction="sum") / count
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * warm
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.golden
def test_the_first_twelve_losses_equal_a_plain_loop_and_the_golden_file(tmp_path: Path) -> None:
    prepared = ready(tmp_path, *OVERRIDES)
    loop_of(prepared, tmp_path).run()
    losses = [r["loss"] for r in steps_of(tmp_path)]
    assert losses == pytest.approx(plain_losses(tmp_path), rel=1e-6)
    assert losses == pytest.approx(json.loads(GOLDEN.read_text())["losses"], rel=1e-5)
