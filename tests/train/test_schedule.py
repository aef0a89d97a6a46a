"""Schedules are pure functions of committed steps, between 0 and 1, never zero at the start."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finitune.train.schedule import SCHEDULES, Shape

shapes = st.builds(
    Shape,
    total_steps=st.integers(1, 500),
    warmup_steps=st.integers(0, 100),
    decay_steps=st.integers(0, 100),
    min_ratio=st.floats(0, 1),
)


@given(st.sampled_from(sorted(SCHEDULES)), shapes, st.integers(0, 1000))
def test_every_factor_lies_between_zero_and_one_and_repeats(name: str, shape: Shape, k: int) -> None:
    schedule = SCHEDULES[name](shape)
    assert 0.0 <= schedule(k) <= 1.0
    assert schedule(k) == SCHEDULES[name](shape)(k)


@given(st.sampled_from(sorted(SCHEDULES)), shapes)
def test_the_first_step_of_a_longer_run_trains(name: str, shape: Shape) -> None:
    if shape.total_steps > shape.decay_steps:
        assert SCHEDULES[name](shape)(0) > 0.0


def test_known_values() -> None:
    shape = Shape(total_steps=10, warmup_steps=4, decay_steps=2, min_ratio=0.1)
    assert [SCHEDULES["linear"](shape)(k) for k in (0, 3, 4)] == [pytest.approx(0.2), pytest.approx(0.8), 1.0]
    assert SCHEDULES["linear"](shape)(10) == pytest.approx(0.1)
    assert SCHEDULES["cosine"](shape)(7) == pytest.approx(0.1 + 0.9 * 0.5)
    assert SCHEDULES["cosine"](shape)(10) == pytest.approx(0.1)
    assert [SCHEDULES["warmup_stable_decay"](shape)(k) for k in (4, 8, 9, 10)] == [
        1.0,
        1.0,
        pytest.approx(0.55),
        pytest.approx(0.1),
    ]
    assert SCHEDULES["constant"](shape)(0) == 1.0
    assert SCHEDULES["constant_with_warmup"](shape)(99) == 1.0
