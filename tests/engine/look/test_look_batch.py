"""The look at the first batch: what its tensors hold."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from finitune.core.types import Finding
from finitune.engine.look.batch import Targets, of_batch, stop_ids

STOP = 3
MODEL: Any = SimpleNamespace(config=SimpleNamespace(eos_token_id=STOP))


def rows(*, stop_label: int = STOP, width: int = 8) -> list[tuple[str, Tensor]]:
    """Four rows that end with the stop token, padded with it."""
    ids = torch.full((4, width), STOP)
    labels = torch.full((4, width), -100)
    for row in range(4):
        length = 3 + row
        ids[row, :length] = torch.arange(10, 10 + length)
        labels[row, 1:length] = ids[row, 1:length]
        labels[row, length] = stop_label
    return [("input_ids", ids), ("labels", labels), ("attention_mask", torch.ones_like(ids))]


def codes(found: tuple[Finding, ...]) -> list[tuple[str, str]]:
    return [(f.code, f.data["fault_class"]) for f in found]


def test_good_rows_give_nothing_to_say() -> None:
    assert of_batch([rows()], MODEL) == ()


def test_a_stop_token_that_is_always_masked_is_told() -> None:
    found = of_batch([rows(stop_label=-100)], MODEL)
    assert codes(found) == [("DAT112", "P")]
    assert (found[0].data["num_rows"], found[0].data["followed"]) == (4, 4)


def test_one_supervised_stop_in_the_step_is_enough() -> None:
    assert of_batch([rows(stop_label=-100), rows()], MODEL) == ()


def test_rows_that_are_cut_off_or_hold_no_stop_at_all_are_no_fault() -> None:
    ids = torch.arange(10, 42).reshape(4, 8)
    assert of_batch([[("input_ids", ids), ("labels", ids)]], MODEL) == ()
    assert of_batch([rows(stop_label=-100)], SimpleNamespace()) == ()  # type: ignore[arg-type]


def test_stop_ids_are_those_of_both_configurations() -> None:
    model: Any = SimpleNamespace(config=SimpleNamespace(eos_token_id=1), generation_config=None)
    assert stop_ids(model) == {1}
    model.generation_config = SimpleNamespace(eos_token_id=[2, 5])
    assert stop_ids(model) == {1, 2, 5}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_number_is_named_by_tensor_and_row(value: float) -> None:
    pixels = torch.ones(4, 3, 2, 2)
    pixels[2, 1, 0, 1] = value
    found = of_batch([[("pixel_values", pixels)]], MODEL)
    assert codes(found) == [("DAT111", "N")]
    assert (found[0].data["index"], found[0].data["row_numbers"], found[0].data["bad"]) == ("2, 1, 0, 1", "3", 1)
    assert (found[0].data["micro"], found[0].data["row_indices"]) == (0, [2])


def test_a_missing_reward_is_a_matter_of_the_reward_function() -> None:
    found = of_batch([[("rewards", torch.tensor([0.1, math.nan, 0.3]))]], MODEL)
    assert codes(found) == [("DAT113", "K")]


def test_a_token_without_any_key_is_told_and_a_finite_minimum_is_not() -> None:
    low = torch.finfo(torch.bfloat16).min
    mask = torch.full((2, 1, 4, 4), low, dtype=torch.bfloat16).triu(1)
    mask[1, 0, 2] = low
    assert of_batch([[("attention_mask", mask)]], MODEL) == ()
    found = of_batch([[("attention_mask", mask + mask)]], MODEL)
    assert codes(found) == [("DAT110", "E")]
    assert found[0].data["index"] == "1, 0, 2"


@pytest.mark.parametrize("tensor", [torch.zeros(0), torch.tensor(1.0), torch.zeros(2, 0, 3), torch.tensor(math.nan)])
def test_odd_shapes_raise_nothing(tensor: Tensor) -> None:
    of_batch([[("x", tensor), ("labels", tensor), ("input_ids", tensor), ("some_mask", tensor)]], MODEL)
    Targets().add([[("labels", tensor)]])


def labels(empty: int, count: int) -> list[tuple[str, Tensor]]:
    out = torch.full((count, 6), 5)
    out[:empty] = -100
    return [("labels", out)]


def test_rows_without_a_target_are_told_once_there_are_many() -> None:
    counting = Targets()
    told = [counting.add([labels(1, 4)]) for _ in range(40)]
    assert [f.code for found in told for f in found] == ["DAT114"]
    assert (counting.num_empty, counting.num_rows) == (12, 48)


@pytest.mark.parametrize(("empty", "count", "by_row"), [(1, 8, 500), (1, 10, 700), (1, 4, 80), (4, 4, 12)])
def test_the_more_rows_are_seen_the_smaller_a_share_is_told(empty: int, count: int, by_row: int) -> None:
    counting = Targets()
    told = [counting.num_rows for _ in range(200) if counting.add([labels(empty, count)])]
    assert len(told) == 1
    assert told[0] <= by_row


def test_one_empty_row_in_twenty_is_ordinary_data() -> None:
    counting = Targets()
    assert not any(counting.add([labels(step % 5 == 0, 4)]) for step in range(2000))
