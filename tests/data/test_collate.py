"""Batches: padding, labels, and packed documents that do not see each other (proven by logits)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from finitune.core.types import RowId
from finitune.data.collate import IGNORED, Batch, additive_mask, collate, collate_packed
from finitune.data.records import Encoded

PAD = 0


def row(length: int, number: int = 1, first_target: int = 1) -> Encoded:
    ids = np.random.Generator(np.random.PCG64(number)).integers(1, 96, length).astype(np.int32)
    return Encoded(RowId("rows.jsonl", number, f"{number:012x}"), ids, np.arange(length) >= first_target)


def test_no_padding_means_no_mask() -> None:
    batch = collate([row(5, 1), row(5, 2)], PAD)
    assert batch.attention_mask is None
    assert batch.position_ids_BT is None
    assert batch.ids_BT.dtype == batch.labels_BT.dtype == torch.int64


def test_padding_is_on_the_right_and_only_as_wide_as_needed() -> None:
    batch = collate([row(3, 1), row(5, 2)], PAD)
    assert batch.ids_BT.shape == (2, 5)
    assert batch.ids_BT[0, 3:].tolist() == [PAD, PAD]
    assert batch.labels_BT[0, 3:].tolist() == [IGNORED, IGNORED]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.num_tokens == 8


def test_labels_are_ids_in_place_where_supervised() -> None:
    one = row(6, 1, first_target=3)
    batch = collate([one], PAD)
    assert batch.labels_BT[0].tolist() == [IGNORED] * 3 + one.ids[3:].tolist()
    assert batch.num_supervised == 3


def test_the_end_token_keeps_its_label_even_where_it_is_the_pad_token() -> None:
    one = Encoded(RowId("r", 1, "0"), np.array([4, 5, PAD], np.int32), np.array([False, True, True]))
    batch = collate([one, row(5, 2)], PAD)
    assert batch.labels_BT[0].tolist() == [IGNORED, 5, PAD, IGNORED, IGNORED]


@pytest.mark.parametrize("packed", [False, True])
def test_a_first_token_is_never_a_target_whatever_the_row_says(packed: bool) -> None:
    rows = [row(4, 1, first_target=0), row(3, 2, first_target=0)]
    batch = collate_packed([rows], PAD) if packed else collate(rows, PAD)
    assert batch.num_supervised == 3 + 2
    assert int((batch.labels_BT != IGNORED).sum()) == batch.num_supervised


def test_packed_positions_restart_and_documents_are_separate() -> None:
    batch = collate_packed([[row(2, 1), row(3, 2)], [row(4, 3)]], PAD)
    assert batch.position_ids_BT is not None
    assert batch.position_ids_BT.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.shape == (2, 1, 5, 5)
    assert batch.attention_mask.dtype == torch.bool
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert batch.attention_mask[0, 0].int().tolist() == expected
    assert [str(r) for r in batch.row_ids] == [str(row(1, n).id) for n in (1, 2, 3)]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=3))
def test_every_attention_row_sees_something_and_nothing_foreign(bins: list[list[int]]) -> None:
    batch = collate_packed([[row(n, 10 * b + i) for i, n in enumerate(sizes)] for b, sizes in enumerate(bins)], PAD)
    assert batch.attention_mask is not None
    for sizes, mask_TT in zip(bins, batch.attention_mask[:, 0], strict=True):
        assert mask_TT.any(dim=1).all(), "a row that attends to nothing is NaN after softmax"
        start = 0
        for size in sizes:
            inside = mask_TT[start : start + size]
            assert int(inside.sum()) == size * (size + 1) // 2
            assert int(inside[:, start : start + size].sum()) == size * (size + 1) // 2
            start += size


def llama(implementation: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation=implementation,
    )
    return LlamaForCausalLM(config).eval()


def logits_of(model: LlamaForCausalLM, batch: Batch, mask: torch.Tensor | None) -> torch.Tensor:
    with torch.no_grad():
        return model(
            input_ids=batch.ids_BT, attention_mask=mask, position_ids=batch.position_ids_BT, use_cache=False
        ).logits


def model_mask(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """The mask in the form that the model's attention takes."""
    assert batch.attention_mask is not None
    if model.config._attn_implementation == "eager":
        return additive_mask(batch.attention_mask, torch.float32)
    return batch.attention_mask


BINS = [[row(7, 1), row(4, 2), row(9, 3)], [row(12, 4), row(3, 5)]]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_logits_equal_those_of_the_rows_alone(implementation: str) -> None:
    model = llama(implementation)
    batch = collate_packed(BINS, PAD)
    packed = logits_of(model, batch, model_mask(model, batch))
    assert packed.isfinite().all()
    for b, rows in enumerate(BINS):
        start = 0
        for one in rows:
            alone = logits_of(model, collate([one], PAD), None)[0]
            torch.testing.assert_close(packed[b, start : start + len(one)], alone, rtol=0, atol=1e-5)
            start += len(one)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_without_the_document_mask_they_differ(implementation: str) -> None:
    """Shows that the test above can fail: a plain causal mask lets the second document see the first."""
    model = llama(implementation)
    batch = collate_packed([BINS[0]], PAD)
    causal = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    leaking = logits_of(model, batch, additive_mask(causal, torch.float32))
    alone = logits_of(model, collate([BINS[0][1]], PAD), None)[0]
    assert (leaking[0, 7:11] - alone).abs().max() > 1e-3


def test_without_restarted_positions_the_second_document_is_seen_elsewhere() -> None:
    batch = collate_packed([BINS[0]], PAD)
    assert batch.position_ids_BT is not None
    starts = [i for i, p in enumerate(batch.position_ids_BT[0].tolist()) if p == 0]
    assert starts == [0, 7, 11]


def test_a_boolean_mask_is_no_mask_for_eager_attention() -> None:
    """Why ``additive_mask`` exists: transformers adds a boolean mask to eager scores as 0 and 1."""
    model = llama("eager")
    batch = collate_packed([BINS[0]], PAD)
    wrong = logits_of(model, batch, batch.attention_mask)
    alone = logits_of(model, collate([BINS[0][1]], PAD), None)[0]
    assert (wrong[0, 7:11] - alone).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_additive_mask_is_finite_in_every_precision(dtype: torch.dtype) -> None:
    mask = additive_mask(torch.tensor([[[[True, False]]]]), dtype)
    assert mask.dtype == dtype
    assert mask.isfinite().all()
    assert mask.flatten().tolist() == [0.0, torch.finfo(dtype).min]


def test_to_moves_everything_and_keeps_the_counts() -> None:
    for batch in (collate([row(3), row(4)], PAD), collate_packed(BINS, PAD)):
        moved = batch.to("meta")
        assert moved.ids_BT.is_meta
        assert moved.labels_BT.is_meta
        assert moved.attention_mask is not None
        assert moved.attention_mask.is_meta
        assert (moved.num_tokens, moved.num_supervised, moved.row_ids) == (
            batch.num_tokens,
            batch.num_supervised,
            batch.row_ids,
        )


def test_padded_logits_equal_those_of_the_rows_alone() -> None:
    model = llama("sdpa")
    rows = [row(5, 1), row(9, 2)]
    batch = collate(rows, PAD)
    padded = logits_of(model, batch, batch.attention_mask)
    alone = logits_of(model, collate([rows[0]], PAD), None)[0]
    torch.testing.assert_close(padded[0, :5], alone, rtol=0, atol=1e-5)
