"""AutoClip clips to a percentile of the newest norms, and no bad norm gets among them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finitune.engine.clippers.autoclip import WINDOW_UPDATES, Clipper, percentile

NORMS = st.floats(min_value=0.0, max_value=3.4e38)
BAD = st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 1e39])


def test_a_trajectory_is_that_of_the_original() -> None:
    norms = [1.0 + math.sin(3 * t) ** 2 + (50.0 if t == 40 else 0.0) for t in range(80)]
    clipper = Clipper()
    ours = [clipper.factor(n) for n in norms]
    theirs = [min(1.0, np.percentile(norms[: t + 1], 10) / (n + 1e-6)) for t, n in enumerate(norms)]
    assert ours == pytest.approx(theirs, rel=1e-12)
    assert ours[40] < 0.03


def test_a_hand_computed_case() -> None:
    """Of 1, 2, 3 the 10th percentile is 1.2; the third norm is clipped to it."""
    clipper = Clipper()
    assert [clipper.factor(n) for n in (1.0, 2.0, 3.0)] == pytest.approx([1.0, 1.1 / 2, 1.2 / 3], rel=1e-5)


def test_old_norms_are_forgotten() -> None:
    clipper = Clipper()
    clipper.factor(1e-3)
    for _ in range(WINDOW_UPDATES):
        clipper.factor(5.0)
    assert clipper.state() == {"norms": [5.0] * WINDOW_UPDATES}


@given(st.lists(NORMS, min_size=1, max_size=30), st.floats(min_value=0, max_value=100))
def test_the_percentile_is_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), rel=1e-9, abs=1e-300)


@settings(deadline=None)
@given(st.lists(NORMS, max_size=40), BAD)
def test_a_bad_norm_is_refused_and_changes_nothing(norms: list[float], bad: float) -> None:
    clipper = Clipper()
    for n in norms:
        clipper.factor(n)
    before = clipper.state()
    with pytest.raises(ValueError, match="can be clipped by"):
        clipper.factor(bad)
    assert clipper.state() == before


@settings(deadline=None)
@given(st.lists(NORMS | st.sampled_from([0.0, -0.0, 5e-324, 3.4e38]), min_size=1, max_size=40))
def test_factors_are_positive_and_at_most_one_and_the_state_is_exact_json(norms: list[float]) -> None:
    clipper, loaded = Clipper(), Clipper()
    for n in norms:
        loaded.load(json.loads(json.dumps(clipper.state(), allow_nan=False)))
        factor = clipper.factor(n)
        assert 0.0 < factor <= 1.0
        assert loaded.factor(n) == factor


@pytest.mark.parametrize("state", [{}, {"norms": [1.0, math.nan]}, {"norms": ["1"]}, {"norms": 1.0}])
def test_a_broken_state_is_refused_and_changes_nothing(state: dict[str, object]) -> None:
    clipper = Clipper()
    clipper.factor(2.0)
    with pytest.raises(ValueError, match="state"):
        clipper.load(state)
    assert clipper.state() == {"norms": [2.0]}
