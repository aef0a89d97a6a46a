"""A mean of means is told from a mean over tokens, and only where the loss is a mean over tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finitune.core.types import Finding
from finitune.engine.look.cutting import accumulation, joined
from finitune.models.tiny import tiny_llama

SIZES = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 2, "mlp": 64}


def micros(*targets: int, width: int = 16) -> list[dict[str, Tensor]]:
    """One row each; the last so many of its tokens are supervised."""
    generator = torch.Generator().manual_seed(1)
    out = []
    for count in targets:
        ids = torch.randint(4, 60, (1, width), generator=generator)
        labels = ids.clone()
        labels[:, : width - count] = -100
        out.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return out


def looked(batch: list[Any], loss_of: Any = None) -> tuple[Finding, ...]:
    model: Any = tiny_llama(0, **SIZES).train()
    given = loss_of or (lambda m, b: m(**b, use_cache=False).loss)
    before = torch.get_rng_state()
    found = accumulation(model, lambda b: given(model, b), batch, list(model.named_parameters()))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())
    return found


def test_short_and_long_micro_batches_are_told_with_the_angle() -> None:
    (found,) = looked(micros(1, 11))
    assert (found.code, found.data["fault_class"]) == ("OPT112", "L")
    assert (found.data["fewest"], found.data["most"], found.data["weight"]) == (1, 11, 11.0)
    assert 0.0 < found.data["cosine"] < 0.9
    assert found.data["ratio"] > 1.05


@pytest.mark.parametrize("targets", [(6, 6), (4, 4, 4), (9,), (10, 11, 10, 11)])
def test_micro_batches_of_about_one_size_are_fine(targets: tuple[int, ...]) -> None:
    assert looked(micros(*targets)) == ()


def test_a_loss_that_is_divided_by_the_tokens_of_the_step_is_fine() -> None:
    def by_step(model: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        total = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
        return total * 2 / 12

    assert looked(micros(1, 11), by_step) == ()


@pytest.mark.parametrize("batch", [[(1, 2), (3, 4)], [torch.zeros(2, 3)] * 2, [{"labels": 3}, {"labels": 4}]])
def test_batches_of_another_form_are_passed(batch: list[Any]) -> None:
    assert looked(batch) == ()


def test_rows_are_joined_at_one_width() -> None:
    parts = [micros(3, width=8)[0], micros(3, width=11)[0]]
    whole = joined(parts, pad_id=7)
    assert whole is not None
    assert whole["input_ids"].shape == (2, 11)
    assert whole["input_ids"][0, 8:].tolist() == [7, 7, 7]
    assert whole["labels"][0, 8:].tolist() == [-100] * 3
    assert whole["attention_mask"][0].sum() == 8


def test_a_scalar_that_all_micro_batches_share_is_kept() -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    micros = [{"input_ids": ids, "num_items": torch.tensor(7.0)} for _ in range(2)]
    whole = joined(micros)
    assert whole is not None
    assert (whole["input_ids"].shape, float(whole["num_items"])) == ((4, 3), 7.0)
    micros[1]["num_items"] = torch.tensor(8.0)
    assert joined(micros) is None
