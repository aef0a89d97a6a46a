"""A batch gets more or less padding, and the model computes the same loss from it."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding, LlamaConfig, LlamaForCausalLM

from finitune.engine.conditions import NotPossible
from finitune.engine.realise import widen_batch


def batch() -> dict[str, Any]:
    """Two rows of 6; the second has 4 tokens."""
    ids = torch.arange(2, 14).reshape(2, 6)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    return {
        "input_ids": ids.masked_fill(mask == 0, 1),
        "labels": ids.masked_fill(mask == 0, -100),
        "attention_mask": mask,
        "position_ids": torch.arange(6).expand(2, 6),
        "row_weight": torch.ones(2),
        "count": 10,
    }


def packed(dtype: torch.dtype = torch.bool) -> dict[str, Any]:
    """One row of 6 that holds two documents and one token of padding."""
    documents = torch.tensor([0, 0, 0, 1, 1, 2])
    mask = ((documents[:, None] == documents[None]) & torch.ones(6, 6).tril().bool())[None, None]
    if dtype != torch.bool:
        mask = torch.zeros(1, 1, 6, 6, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return {
        "input_ids": torch.tensor([[2, 3, 4, 5, 6, 1]]),
        "labels": torch.tensor([[-100, 3, 4, -100, 6, -100]]),
        "attention_mask": mask,
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]]),
    }


def loss(inputs: dict[str, Any]) -> Tensor:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    named = {k: v for k, v in inputs.items() if k.endswith("ids") or k == "attention_mask"}
    logits = model(**named, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


@pytest.mark.parametrize("extra", [1, 8, -1, -2])
def test_the_loss_stays_at_another_width(extra: int) -> None:
    inputs = batch()
    if extra < 0:
        inputs = {k: v[1:] if isinstance(v, Tensor) else v for k, v in inputs.items()}
    wider = widen_batch(inputs, extra, pad_id=1)
    assert wider["input_ids"].shape[1] == 6 + extra
    assert wider["row_weight"] is inputs["row_weight"]
    assert wider["count"] == 10
    torch.testing.assert_close(loss(wider), loss(inputs))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("extra", [1, 5, -1])
def test_the_loss_of_a_packed_batch_stays(dtype: torch.dtype, extra: int) -> None:
    inputs = packed(dtype)
    wider = widen_batch(inputs, extra, pad_id=1)
    assert wider["attention_mask"].shape == (1, 1, 6 + extra, 6 + extra)
    torch.testing.assert_close(loss(wider), loss(inputs))


@pytest.mark.parametrize(("dtype", "open_"), [(torch.bool, True), (torch.float16, 0.0), (torch.float32, 0.0)])
def test_new_rows_of_a_mask_see_themselves_and_nobody_sees_new_columns(dtype: torch.dtype, open_: Any) -> None:
    mask = widen_batch(packed(dtype), 2)["attention_mask"][0, 0]
    seen = mask if dtype == torch.bool else mask == 0
    assert torch.equal(seen[6:], torch.eye(8).bool()[6:])
    assert not seen[:6, 6:].any()
    assert mask.isfinite().all()


def test_what_is_filled_in() -> None:
    wider = widen_batch(batch(), 2, pad_id=9)
    assert wider["input_ids"][:, 6:].tolist() == [[9, 9]] * 2
    assert wider["labels"][:, 6:].tolist() == [[-100, -100]] * 2
    assert wider["attention_mask"][:, 6:].tolist() == [[0, 0]] * 2
    assert wider["position_ids"][:, 6:].tolist() == [[6, 7]] * 2


def test_the_batch_itself_is_not_touched_and_zero_changes_nothing() -> None:
    inputs, untouched = batch(), batch()
    widen_batch(inputs, 3)
    widen_batch([packed()], 3)
    assert all(torch.equal(inputs[k], untouched[k]) for k in inputs if isinstance(inputs[k], Tensor))
    assert widen_batch(inputs, 0) is inputs


def test_there_and_back_is_the_same_batch() -> None:
    for inputs in (batch(), packed(), packed(torch.float32)):
        back = widen_batch(widen_batch(inputs, 4), -4)
        assert all(torch.equal(back[k], v) for k, v in inputs.items() if isinstance(v, Tensor))


@dataclass(frozen=True)
class Record:
    ids_BT: Tensor
    labels_BT: Tensor
    attention_mask: Tensor | None
    num_tokens: int = 3


Named = namedtuple("Named", "input_ids labels")


def test_every_kind_of_container() -> None:
    plain = batch()
    ids, labels = plain["input_ids"], plain["labels"]
    encoding = widen_batch(BatchEncoding({"input_ids": ids, "labels": labels}), 1)
    assert isinstance(encoding, BatchEncoding)
    assert encoding["input_ids"].shape == (2, 7)
    assert widen_batch(UserDict(input_ids=ids, labels=labels), 1)["labels"].shape == (2, 7)
    record = widen_batch(Record(ids, labels, None), 1)
    assert (record.ids_BT.shape, record.labels_BT.shape, record.num_tokens) == ((2, 7), (2, 7), 3)
    assert widen_batch(Named(ids, labels), 1).labels.shape == (2, 7)
    assert [b["labels"].shape[1] for b in widen_batch([plain, plain], 2)] == [8, 8]


PADDED = {
    "attention_mask": torch.tensor([[1] * 5 + [0]] * 2),
    "labels": torch.tensor([[2] * 5 + [-100]] * 2),
}


@pytest.mark.parametrize(
    ("change", "extra", "why"),
    [
        ({"inputs_embeds": torch.zeros(2, 6, 4)}, 1, "inputs_embeds of shape"),
        ({"rewards": torch.zeros(2, 6)}, 1, "rewards of shape"),
        ({**PADDED, "rewards": torch.zeros(2, 6)}, -1, "how to cut rewards"),
        ({"labels": None}, 1, "no labels"),
        ({"input_ids": None}, 1, "no token ids"),
        ({"images": [torch.zeros(2)]}, 1, "images is a nest"),
        ({"attention_mask": torch.ones(2, 1, 6, 6, dtype=torch.int64)}, 1, "neither boolean nor floating"),
        ({"attention_mask": None}, -1, "no attention mask"),
        ({}, -1, "not all padding"),
        ({}, -6, "nothing would be left"),
        ({"attention_mask": torch.tensor([[1] * 5 + [0]] * 2)}, -1, "there are labels"),
    ],
)
def test_what_is_not_understood_is_not_possible(change: dict[str, Any], extra: int, why: str) -> None:
    with pytest.raises(NotPossible, match=why):
        widen_batch({**batch(), **change}, extra)


@pytest.mark.parametrize("nest", [torch.zeros(2, 6), 3, "text"])
def test_tensors_without_names_are_not_possible(nest: Any) -> None:
    with pytest.raises(NotPossible, match="has no names"):
        widen_batch(nest, 1)
