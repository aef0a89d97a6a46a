"""A seal breaks by any change of a bit, and holds as long as there is none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finitune.numerics.seal import block_sums, seal

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.float8_e5m2]


def bits(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, generator=generator).to(dtype)


@given(st.integers(1, 20_000), st.sampled_from(DTYPES), st.data())
@settings(max_examples=150, deadline=None)
def test_any_flipped_bit_breaks_it(size: int, dtype: torch.dtype, data: st.DataObject) -> None:
    tensor = bits(size, dtype)
    made = seal([("t", tensor)], {"step": 1})
    assert made.holds([("t", tensor)], {"step": 1})
    raw = tensor.view(torch.uint8)
    place = data.draw(st.integers(0, raw.numel() - 1))
    raw[place] ^= 1 << data.draw(st.integers(0, 7))
    assert not made.holds([("t", tensor)], {"step": 1})


@given(st.integers(2, 9000), st.data())
@settings(max_examples=80, deadline=None)
def test_any_overwritten_stretch_breaks_it(size: int, data: st.DataObject) -> None:
    tensor = bits(size)
    made = seal([("t", tensor)], {})
    first = data.draw(st.integers(0, size - 1))
    last = data.draw(st.integers(first, size - 1))
    tensor[first : last + 1] = 0.0
    assert not made.holds([("t", tensor)], {})


def test_blocks_that_change_places_break_it() -> None:
    tensor = bits(1 << 15)
    made = seal([("t", tensor)], {})
    assert not made.holds([("t", tensor.view(4, -1).flip(0).reshape(-1))], {})


@pytest.mark.parametrize(
    "changed",
    [
        [("other", torch.ones(4))],
        [("t", torch.ones(2, 2))],
        [("t", torch.ones(4).view(torch.int32))],
        [("t", torch.ones(4)), ("more", torch.ones(4))],
        [],
    ],
    ids=["name", "shape", "dtype", "one more", "one less"],
)
def test_another_name_form_or_number_breaks_it(changed: list[tuple[str, torch.Tensor]]) -> None:
    assert not seal([("t", torch.ones(4))], {}).holds(changed, {})


def test_another_record_breaks_it_and_minus_zero_is_not_zero() -> None:
    made = seal([("t", torch.zeros(3))], {"a": 1, "b": [1.5, None]})
    assert made.holds([("t", torch.zeros(3))], {"b": [1.5, None], "a": 1})
    assert not made.holds([("t", torch.zeros(3))], {"a": 1, "b": [1.5, 0]})
    assert not made.holds([("t", -torch.zeros(3))], {"a": 1, "b": [1.5, None]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_the_sums_are_of_the_values_wherever_they_lie(dtype: torch.dtype) -> None:
    whole = torch.arange(200).to(dtype)
    assert torch.equal(block_sums(whole[3:]), block_sums(whole[3:].clone()))
    assert torch.equal(block_sums(whole.view(10, 20).t()), block_sums(whole.view(10, 20).t().contiguous()))
    assert block_sums(torch.tensor(1.5)).tolist() == [0, 0x3FC00000]
    assert block_sums(torch.zeros(0, 3)).numel() == 0
