"""Character spans to token masks: the boundary rules."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finitune.core.errors import UserError
from finitune.data.tokens import OffsetTokenizer, supervised_mask


def mask(offsets: list[tuple[int, int]], *spans: tuple[int, int]) -> list[bool]:
    return supervised_mask(np.array(offsets, dtype=np.int32).reshape(-1, 2), spans).tolist()


def test_a_token_counts_if_it_lies_wholly_inside() -> None:
    assert mask([(0, 2), (2, 4), (4, 6), (6, 8)], (2, 6)) == [False, True, True, False]


def test_a_token_that_straddles_an_edge_does_not_count() -> None:
    assert mask([(0, 1), (1, 3), (3, 5), (5, 7)], (2, 6)) == [False, False, True, False]


def test_a_token_without_characters_belongs_to_the_span_it_opens() -> None:
    assert mask([(0, 2), (2, 2), (2, 4), (4, 4), (4, 5)], (2, 4)) == [False, True, True, False, False]


def test_position_zero_is_never_a_target() -> None:
    assert mask([(0, 1), (1, 2)], (0, 2)) == [False, True]
    assert mask([], (0, 2)) == []


def test_pieces_of_one_character_count_together() -> None:
    assert mask([(0, 1), (1, 2), (1, 2), (1, 2)], (1, 2)) == [False, True, True, True]


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=2, max_size=30), st.integers(0, 40), st.integers(0, 40))
def test_mask_is_the_definition_token_by_token(cuts: list[int], a: int, b: int) -> None:
    edges = sorted(cuts)
    offsets = list(pairwise(edges))
    start, end = min(a, b), max(a, b)
    expected = [i > 0 and start <= s < end and e <= end for i, (s, e) in enumerate(offsets)]
    assert mask(offsets, (start, end)) == expected


def test_offsets_are_not_trimmed_so_that_leading_spaces_are_owned(tokenizer_for: Callable[..., Any]) -> None:
    tokenizer = tokenizer_for("chatml")
    trimmed = tokenizer("Hello there", return_offsets_mapping=True)["offset_mapping"]
    assert trimmed[1] == (6, 11), "the tokenizer itself trims: otherwise this test shows nothing"
    (tokens,) = OffsetTokenizer(tokenizer).encode(["Hello there"])
    assert tokens.offsets_N2.tolist() == [[0, 5], [5, 11]]


def test_the_users_tokenizer_is_left_alone(tokenizer_for: Callable[..., Any]) -> None:
    tokenizer = tokenizer_for("chatml")
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    before = tokenizer.backend_tokenizer.to_str()
    (tokens,) = OffsetTokenizer(tokenizer).encode(["Hello there Hi friend"])
    assert len(tokens) == 4, "neither truncated nor padded"
    assert tokenizer.backend_tokenizer.to_str() == before


@settings(deadline=None, max_examples=50)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_tokens_cover_any_text_in_order(text: str, tokenizer_for: Callable[..., Any]) -> None:
    (tokens,) = OffsetTokenizer(_once(tokenizer_for)).encode([text])
    starts, ends = tokens.offsets_N2[:, 0], tokens.offsets_N2[:, 1]
    assert (starts[1:] >= starts[:-1]).all()
    assert not len(tokens) or (starts[0] == 0 and ends[-1] == len(text))


_made: list[Any] = []


def _once(tokenizer_for: Callable[..., Any]) -> Any:
    if not _made:
        _made.append(tokenizer_for("chatml"))
    return _made[0]


def test_a_slow_tokenizer_is_refused_with_the_cure() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match=r"(?s)DAT014.*Slow.*use_fast=True"):
        OffsetTokenizer(Slow())
