"""Quarantined rows are left out wherever they come up, by what they hold; everything else stays where it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finitune.core.types import RowId
from finitune.data.collate import beginning, chosen, collate, collate_packed, widened
from finitune.data.dataset import Dataset
from finitune.data.loader import Cursor, Loader, LoaderConfig
from finitune.data.records import Encoded


def row(number: int, length: int) -> Encoded:
    ids = (np.arange(length) + 10 * number + 1).astype(np.int64)
    supervised = np.arange(length) >= length // 2
    return Encoded(RowId.of("rows.jsonl", number + 1, b"row %d" % number), ids, supervised)


ROWS = [row(n, 3 + n % 5) for n in range(11)]


def loader(*, packing: bool = False, seed: int = 0, batch_size: int = 2) -> Loader:
    config = LoaderConfig(batch_size=batch_size, accumulation=2, seed=seed, packing=packing, max_length=12)
    return Loader(Dataset(ROWS), config)


def everything(one: Loader, epoch: int, without: tuple[str, ...]) -> list[list[tuple[RowId, ...]]]:
    steps = [one.at(Cursor(epoch, s), without=without) for s in range(one.steps_per_epoch(epoch))]
    return [[b.row_ids for b in batches] for batches in steps]


@given(st.sets(st.integers(0, 10)), st.booleans(), st.integers(0, 3), st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_whatever_the_order_they_are_missing_and_all_others_there(
    bad: set[int], packing: bool, seed: int, epoch: int
) -> None:
    one = loader(packing=packing, seed=seed)
    without = tuple(ROWS[n].id.digest for n in bad)
    found = everything(one, epoch, without)
    assert sorted(r.row - 1 for step in found for micro in step for r in micro) == sorted(set(range(11)) - bad)
    plain = everything(one, epoch, ())
    sifted = [[tuple(r for r in micro if r.row - 1 not in bad) for micro in step] for step in plain]
    assert found == [[micro for micro in step if micro] for step in sifted]
    for number, step in enumerate(found):
        cursor = Cursor(epoch, number)
        assert one.peek_rows(cursor, without=without) == tuple(r for micro in step for r in micro)
        layout = one.layout(cursor, without=without)
        assert [tuple(r for sequence in micro for r in sequence) for micro in layout] == step
        batches = one.at(cursor, without=without)
        assert [len(b.ids_BT) for b in batches] == [len(micro) for micro in layout]
        assert all(layout_row for micro in layout for layout_row in micro)


def test_a_step_whose_rows_are_all_bad_is_empty_and_the_next_one_comes_as_ever() -> None:
    one = loader()
    first = one.peek_rows(Cursor())
    without = tuple(r.digest for r in first)
    assert one.at(Cursor(), without=without) == ()
    assert one.advance(Cursor()) == Cursor(0, 1)
    assert one.peek_rows(Cursor(0, 1), without=without) == one.peek_rows(Cursor(0, 1))


def test_copies_of_a_row_and_pieces_of_a_document_go_together() -> None:
    twin = Encoded(RowId("other.jsonl", 1, ROWS[0].id.digest), ROWS[0].ids, ROWS[0].supervised)
    one = Loader(Dataset([*ROWS, twin]), LoaderConfig(batch_size=2))
    left = [r for step in everything(one, 0, (ROWS[0].id.digest,)) for micro in step for r in micro]
    assert ROWS[0].id not in left
    assert twin.id not in left
    assert len(left) == 10


def test_without_a_quarantine_nothing_is_sifted(monkeypatch: pytest.MonkeyPatch) -> None:
    one = loader()
    monkeypatch.setattr(one, "_sifted", None)
    assert one.at(Cursor())
    assert one.peek_rows(Cursor(), without=())


# ---------------------------------------------------------------- parts of a batch


@pytest.mark.parametrize("places", [[0], [1, 2], [2], [0, 1, 2]])
def test_chosen_places_keep_their_place_and_the_others_hold_copies(places: list[int]) -> None:
    batch = collate(ROWS[:3], pad_id=0)
    part = chosen(batch, places, [ROWS[p].id for p in places])
    assert part.ids_BT.shape == batch.ids_BT.shape
    assert part.row_ids == tuple(ROWS[p].id for p in places)
    for b in range(3):
        source = b if b in places else next(p for p in places if torch.equal(part.ids_BT[b], batch.ids_BT[p]))
        assert torch.equal(part.ids_BT[b], batch.ids_BT[source])
        assert torch.equal(part.labels_BT[b], batch.labels_BT[source])
        assert part.attention_mask is not None
        assert batch.attention_mask is not None
        assert torch.equal(part.attention_mask[b], batch.attention_mask[source])
    assert part.num_supervised == int((part.labels_BT != -100).sum())
    if len(places) == 3:
        assert (part.num_tokens, part.num_supervised) == (batch.num_tokens, batch.num_supervised)


@pytest.mark.parametrize("packed", [False, True])
def test_a_wider_batch_counts_the_same_and_a_longest_prefix_changes_nothing(packed: bool) -> None:
    rows = ROWS[1:5]
    batch = collate_packed([rows[:2], rows[2:]], pad_id=0) if packed else collate(rows, pad_id=0)
    wide = widened(batch, 3, pad_id=0)
    assert (wide.num_tokens, wide.num_supervised) == (batch.num_tokens, batch.num_supervised)
    width = batch.ids_BT.shape[1]
    assert torch.equal(wide.ids_BT[:, :width], batch.ids_BT)
    assert (wide.ids_BT[:, width:] == 0).all()
    assert torch.equal(widened(wide, -3, pad_id=0).ids_BT, batch.ids_BT)
    same = beginning(batch, 1000, pad_id=0)
    assert torch.equal(same.ids_BT, batch.ids_BT)
    assert (same.num_tokens, same.num_supervised) == (batch.num_tokens, batch.num_supervised)
    if packed:
        # As if the padding had been there from the start: each new position attends to itself alone.
        longer = [*rows[2:], row(90, 3)]
        assert wide.attention_mask is not None
        assert wide.attention_mask.any(dim=-1).all()
        assert collate_packed([longer], pad_id=0).ids_BT.shape[1] >= width
        assert torch.equal(wide.attention_mask[..., width:, :width], torch.zeros(2, 1, 3, width, dtype=torch.bool))


def test_a_batch_without_padding_gets_a_mask_when_it_is_widened() -> None:
    batch = collate([ROWS[0], row(5, len(ROWS[0].ids))], pad_id=0)
    assert batch.attention_mask is None
    mask = widened(batch, 2, pad_id=0).attention_mask
    assert mask is not None
    assert mask.tolist() == [[1] * 3 + [0, 0]] * 2
    assert widened(batch, -1, pad_id=0).attention_mask is None


def test_nothing_is_cut_below_two_columns() -> None:
    batch = collate([ROWS[0]], pad_id=0)
    assert widened(batch, -1, pad_id=0).ids_BT.shape[1] == 2
    with pytest.raises(ValueError, match="cannot be cut by 2"):
        widened(batch, -2, pad_id=0)
