"""Seeds are functions of the counters, and unlike for any two places."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from finitune.numerics.seeds import seed_of, seed_torch

counters = st.tuples(st.integers(0, 2**62), st.integers(0, 10**9), st.integers(0, 999), st.integers(0, 999))


@given(counters, counters)
def test_other_places_have_other_seeds(a, b) -> None:
    assert (seed_of(*a) == seed_of(*b)) == (a == b)
    assert 0 <= seed_of(*a) < 2**63


def test_streams_are_apart() -> None:
    assert seed_of(1, 2, stream="train") != seed_of(1, 2, stream="sample")


def test_a_step_draws_the_same_whatever_was_drawn_before() -> None:
    seed_torch(7, 3)
    first = torch.rand(5)
    torch.rand(100)
    seed_torch(7, 4)
    other = torch.rand(5)
    seed_torch(7, 3)
    assert torch.equal(torch.rand(5), first)
    assert not torch.equal(other, first)
