"""The loss scale never leaves its bounds, whatever happens for however long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finitune.engine.scaler import LossScaler, ScalerSettings


@given(st.lists(st.sampled_from(["commit", "overflow", "blame", "keep"]), max_size=400))
def test_the_scale_stays_within_its_bounds(events: list[str]) -> None:
    settings = ScalerSettings(growth_interval=3, max_scale=2.0**20)
    scaler = LossScaler(settings)
    for event in events:
        if event == "commit":
            scaler.committed()
        elif event == "overflow":
            scaler.back_off()
        else:
            scaler.give_up(blame_batch=event == "blame")
        assert settings.min_scale <= scaler.scale <= settings.max_scale


def test_two_hundred_overflows_end_at_the_floor_not_at_zero() -> None:
    scaler = LossScaler(ScalerSettings())
    for _ in range(200):
        scaler.back_off()
    assert scaler.scale == 2.0**-4
    assert scaler.exhausted


def test_growth_needs_an_unbroken_run_of_clean_steps() -> None:
    scaler = LossScaler(ScalerSettings(init_scale=8.0, growth_interval=4))
    for _ in range(3):
        scaler.committed()
    scaler.back_off()
    assert scaler.scale == 4.0
    for _ in range(3):
        scaler.committed()
    assert scaler.scale == 4.0
    scaler.committed()
    assert scaler.scale == 8.0


def test_one_bad_batch_gives_the_scale_back_but_several_keep_it_low() -> None:
    scaler = LossScaler(ScalerSettings(init_scale=1024.0, max_retries=3))
    for _ in range(3):
        scaler.back_off()
    assert scaler.exhausted
    scaler.give_up(blame_batch=True)
    assert scaler.scale == 1024.0
    assert not scaler.exhausted
    for _ in range(3):
        scaler.back_off()
    scaler.give_up(blame_batch=False)
    assert scaler.scale == 128.0


def test_state_comes_back_exactly() -> None:
    scaler = LossScaler(ScalerSettings())
    scaler.back_off()
    scaler.committed()
    other = LossScaler(ScalerSettings())
    other.load(scaler.state())
    assert other.state() == scaler.state()


@pytest.mark.parametrize("retries", [0, 1, 8])
def test_the_number_of_retries_is_what_was_asked_for(retries: int) -> None:
    scaler = LossScaler(ScalerSettings(max_retries=retries))
    count = 0
    while not scaler.exhausted:
        scaler.back_off()
        count += 1
    assert count == retries
