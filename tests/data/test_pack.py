"""Packing puts every row into exactly one bin, whole, and fills the bins well."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from finitune.data.pack import WINDOW_ROWS, pack


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 64), st.randoms(use_true_random=False))
def test_every_row_is_in_exactly_one_bin_that_holds_it(sizes: list[int], capacity: int, random: object) -> None:
    lengths = np.array(sizes, dtype=np.int64)
    order = list(range(len(sizes)))
    random.shuffle(order)  # type: ignore[attr-defined]
    bins = pack(order, lengths, capacity)
    assert sorted(i for b in bins for i in b) == list(range(len(sizes)))
    assert all(lengths[list(b)].sum() <= capacity or len(b) == 1 for b in bins)


def test_first_fit_decreasing_by_hand() -> None:
    lengths = np.array([4, 8, 1, 4, 2, 1])
    assert pack(range(6), lengths, 10) == [(1, 4), (0, 2, 3, 5)]


def test_bins_are_well_filled() -> None:
    lengths = np.random.Generator(np.random.PCG64(3)).integers(10, 300, 5000)
    bins = pack(np.arange(5000), lengths, 512)
    assert lengths.sum() / (512 * len(bins)) > 0.97


def test_rows_never_leave_their_window() -> None:
    lengths = np.full(3 * WINDOW_ROWS, 10)
    bins = pack(np.arange(len(lengths)), lengths, 1000)
    assert all(len({i // WINDOW_ROWS for i in b}) == 1 for b in bins)


def test_packing_is_a_function_of_its_input() -> None:
    lengths = np.random.Generator(np.random.PCG64(5)).integers(1, 99, 700)
    order = np.random.Generator(np.random.PCG64(6)).permutation(700)
    assert pack(order, lengths, 128) == pack(order, lengths, 128)
    assert pack(order, lengths, 128) != pack(order[::-1], lengths, 128)


def test_nothing_packs_to_nothing() -> None:
    assert pack([], np.array([], dtype=np.int64), 8) == []
