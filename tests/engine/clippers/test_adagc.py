"""AdaGC clips each tensor by its own past, and no bad norm gets into it."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finitune.engine.clippers.adagc import Clipper

NORMS = st.floats(min_value=0.0, max_value=3.4e38)
BAD = st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 1e39])


def reference(steps: list[list[float]]) -> list[list[float]]:
    """Algorithm 1 of the paper on norms (none of them 0)."""
    gamma: list[float] = []
    factors = []
    for t, norms in enumerate(steps, start=1):
        if t < 100:
            h = min(1.0 / math.hypot(*norms), 1.0)
            hs = [h] * len(norms)
            gamma = [h * n for n in norms] if t == 1 else [min(g, h * n) for g, n in zip(gamma, norms, strict=True)]
        else:
            hs = [min(1.05 * g / n, 1.0) for g, n in zip(gamma, norms, strict=True)]
            gamma = [0.98 * g + 0.02 * h * n for g, h, n in zip(gamma, hs, norms, strict=True)]
        factors.append(hs)
    return factors


def test_a_trajectory_with_spikes_is_the_reference() -> None:
    steps = [[0.5 + 0.2 * math.sin(t + i) for i in range(3)] for t in range(150)]
    steps[20], steps[120] = [9.0, 0.5, 0.5], [0.5, 30.0, 0.5]
    clipper = Clipper()
    ours = [clipper.factor(math.hypot(*n), n) for n in steps]
    for got, want in zip(ours, reference(steps), strict=True):
        assert got == pytest.approx(want, rel=1e-12)
    assert ours[20][0] == ours[20][1] < 0.12
    assert ours[120][1] < 0.02


def test_a_tensor_whose_first_gradient_is_zero_is_not_clipped_to_zero_for_ever() -> None:
    """The A of LoRA has gradient 0 in the first step, for B is 0 then."""
    clipper = Clipper()
    clipper.factor(1.0, [0.0, 1.0])
    for _ in range(150):
        factors = clipper.factor(math.hypot(0.3, 0.4), [0.3, 0.4])
    assert factors == [1.0, 1.0]


def test_another_number_of_gradients_is_refused_and_changes_nothing() -> None:
    clipper = Clipper()
    clipper.factor(1.0, [0.6, 0.8])
    before = clipper.state()
    with pytest.raises(ValueError, match="3 gradients, where there were 2"):
        clipper.factor(1.0, [0.6, 0.8, 0.0])
    assert clipper.state() == before


@settings(deadline=None)
@given(st.lists(st.tuples(NORMS, NORMS), max_size=20), BAD, st.integers(0, 2))
def test_a_bad_norm_is_refused_and_changes_nothing(steps: list[tuple[float, float]], bad: float, place: int) -> None:
    clipper = Clipper()
    for norms in steps:
        clipper.factor(max(norms), norms)
    before = clipper.state()
    values = [1.0, 1.0, 1.0]
    values[place] = bad
    with pytest.raises(ValueError, match="can be clipped by"):
        clipper.factor(values[0], values[1:])
    assert clipper.state() == before


EDGES = NORMS | st.sampled_from([0.0, -0.0, 5e-324, 3.4e38])


@settings(deadline=None)
@given(st.lists(st.tuples(EDGES, EDGES), min_size=1, max_size=20), st.integers(0, 120))
def test_factors_are_positive_and_at_most_one_and_the_state_is_exact_json(
    steps: list[tuple[float, float]], updates: int
) -> None:
    clipper, loaded = Clipper(), Clipper()
    clipper.load({"updates": updates, "remembered": [0.5, 0.0] if updates else []})
    for norms in steps:
        loaded.load(json.loads(json.dumps(clipper.state(), allow_nan=False)))
        factors = clipper.factor(max(norms), norms)
        assert all(0.0 < f <= 1.0 for f in factors)
        assert loaded.factor(max(norms), norms) == factors


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"updates": -1, "remembered": []},
        {"updates": True, "remembered": []},
        {"updates": 1, "remembered": [math.inf]},
    ],
)
def test_a_broken_state_is_refused_and_changes_nothing(state: dict[str, object]) -> None:
    clipper = Clipper()
    clipper.factor(2.0, [2.0])
    before = clipper.state()
    with pytest.raises(ValueError, match="state"):
        clipper.load(state)
    assert clipper.state() == before
