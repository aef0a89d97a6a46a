"""ZClip follows its published rule, and no bad norm gets into its statistics."""

from __future__ import annotations

import json
import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finitune.engine.clippers.zclip import Clipper

NORMS = st.floats(min_value=0.0, max_value=3.4e38)
BAD = st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 1e39])


def reference(norms: list[float], cap: float) -> list[float]:
    """The rule as one reads it in the paper (section 3 and its algorithm), on lists."""
    factors, mean, variance = [], 0.0, 0.0
    for t, n in enumerate(norms):
        if t < 25:
            factors.append(min(1.0, cap / (n + 1e-6)))
            mean, variance = statistics.fmean(norms[: t + 1]), statistics.pvariance(norms[: t + 1])
            continue
        deviation = variance**0.5
        z = (n - mean) / (deviation + 1e-6)
        limit = mean + 2.5 * deviation * 2.5 / z if z > 2.5 else None
        x = n if limit is None else limit
        factors.append(min(1.0, (cap if limit is None else min(limit, cap)) / (n + 1e-6)))
        mean = 0.97 * mean + 0.03 * x
        variance = 0.97 * variance + 0.03 * (x - mean) ** 2
    return factors


def test_a_trajectory_with_spikes_is_the_reference() -> None:
    norms = [0.4 + 0.1 * math.sin(t) for t in range(60)]
    norms[30], norms[31], norms[50] = 40.0, 7.0, 0.9
    clipper = Clipper()
    ours = [clipper.factor(n) for n in norms]
    assert ours == pytest.approx(reference(norms, 1.0), rel=1e-9)
    assert ours[30] < 0.02
    assert ours[29] == ours[32] == 1.0


def test_the_spike_of_a_hand_computed_case() -> None:
    """12 norms of 1 and 13 of 2: mean 1.52, sd 0.4996. Norm 6: z = 8.967, limit 1.52 + 2.5 * 0.4996 / 3.587 = 1.868."""
    clipper = Clipper(max_grad_norm=None)
    for n in [1.0] * 12 + [2.0] * 13:
        assert clipper.factor(n) == 1.0
    assert clipper.factor(6.0) == pytest.approx(1.8682 / 6.0, rel=1e-4)
    state = clipper.state()
    assert state["mean"] == pytest.approx(0.97 * 1.52 + 0.03 * 1.8682, rel=1e-5)


@settings(deadline=None)
@given(st.lists(NORMS, max_size=60), BAD)
def test_a_bad_norm_is_refused_and_changes_nothing(norms: list[float], bad: float) -> None:
    clipper = Clipper()
    for n in norms:
        clipper.factor(n)
    before = clipper.state()
    with pytest.raises(ValueError, match="can be clipped by"):
        clipper.factor(bad)
    assert clipper.state() == before


@settings(deadline=None)
@given(st.lists(NORMS | st.sampled_from([0.0, -0.0, 5e-324, 1e-45, 3.4e38]), min_size=20, max_size=80))
def test_factors_are_positive_and_at_most_one_and_the_state_is_exact_json(norms: list[float]) -> None:
    clipper, loaded = Clipper(), Clipper()
    for n in norms:
        loaded.load(json.loads(json.dumps(clipper.state(), allow_nan=False)))
        factor = clipper.factor(n)
        assert 0.0 < factor <= 1.0
        assert loaded.factor(n) == factor
    assert loaded.state() == clipper.state()


def test_after_norms_of_zero_only_the_fixed_limit_holds() -> None:
    clipper = Clipper()
    for _ in range(30):
        assert clipper.factor(0.0) == 1.0
    assert clipper.factor(4.0) == pytest.approx(0.25)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"first": [1.0], "mean": math.nan, "variance": 0.0},
        {"first": [math.inf], "mean": 1.0, "variance": 0.0},
        {"first": [1.0] * 26, "mean": 1.0, "variance": 0.0},
        {"first": "123", "mean": 1.0, "variance": 0.0},
        {"first": [1.0], "mean": 1.0, "variance": math.inf},
    ],
)
def test_a_broken_state_is_refused_and_changes_nothing(state: dict[str, object]) -> None:
    clipper = Clipper()
    clipper.factor(2.0)
    before = clipper.state()
    with pytest.raises(ValueError, match="state"):
        clipper.load(state)
    assert clipper.state() == before
