"""Numbers beyond their table are named with row, place and table; what fits is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finitune.engine.tables.beyond import beyond_table
from finitune.models.tiny import tiny_llama

MODEL = tiny_llama(0)
ROWS = 320


@pytest.mark.parametrize("value", [ROWS, ROWS + 7, -1, -100])
@pytest.mark.parametrize("name", ["input_ids", "batch.ids_BT"])
def test_an_id_without_a_row_is_named(value: int, name: str) -> None:
    ids = torch.zeros(2, 5, dtype=torch.long)
    ids[1, 3] = value
    fine = [("input_ids", torch.full((2, 5), ROWS - 1))]
    found = beyond_table([fine, [(name, ids)]], MODEL)
    assert found is not None
    assert (found.code, found.where) == ("DAT115", f"{name}[1, 3]")
    told = [found.data[n] for n in ("value", "table", "num_rows", "micro", "row_indices", "count")]
    assert told == [value, "model.embed_tokens", ROWS, 1, [1], 1]


def test_what_fits_is_not_named_and_the_ignored_label_is_no_id() -> None:
    labels = torch.tensor([[-100, 3, ROWS - 1]])
    mask = torch.ones(1, 3, dtype=torch.long)
    unknown = torch.tensor([[10**6]])
    named = [("labels", labels), ("attention_mask", mask), ("lengths", unknown), ("pixels", torch.zeros(1, 3))]
    assert beyond_table([named], MODEL) is None
    assert beyond_table([[("input_ids", unknown)]], nn.Linear(2, 2)) is None


def test_positions_are_looked_up_in_their_own_table() -> None:
    model = nn.ModuleDict({"tokens": nn.Embedding(50, 4), "position_embeddings": nn.Embedding(8, 4)})
    found = beyond_table([[("position_ids", torch.arange(10)[None])]], model)
    assert found is not None
    assert (found.data["table"], found.data["value"], found.data["count"]) == ("position_embeddings", 8, 2)
