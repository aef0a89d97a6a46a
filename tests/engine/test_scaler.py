"""The loss scale never leaves its bounds, whatever happens for however long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finitune.core.robust import History
from finitune.engine.scaler import LossScaler, ScalerSettings, is_search, skipped_before


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


def test_a_ceiling_bounds_what_is_used_and_what_it_backs_off_from() -> None:
    scaler = LossScaler(ScalerSettings(init_scale=2.0**60))
    assert scaler.in_force == 2.0**60
    scaler.ceiling = 1024.0
    assert scaler.in_force == 1024.0
    scaler.back_off()
    assert scaler.scale == 512.0
    scaler.ceiling = 2.0**-8
    assert scaler.in_force == scaler.settings.min_scale
    assert scaler.exhausted


# -- what is still a search --------------------------------------------------------------------------------------------


def after(committed_at: float | None, overflows: int) -> History:
    history = History()
    if committed_at is not None:
        history.committed(2.0, 1.0, loss_scale=committed_at)
    for _ in range(overflows):
        history.overflowed()
    return history


def searches(start: float, *, factor: float = 0.5, committed: bool, most: int = 60) -> int:
    """How many overflows in a row are left to the scaler."""
    scale, count = start, 0
    while count < most and is_search(scale, after(start if committed else None, count)):
        scale, count = scale * factor, count + 1
    return count


@pytest.mark.parametrize("power", [16, 24, 32])
def test_a_search_at_the_start_may_take_sixteen_halvings(power: int) -> None:
    assert searches(2.0**power, committed=False) == 16


@pytest.mark.parametrize("power", [33, 60, 100])
def test_a_start_above_what_any_framework_begins_with_is_none(power: int) -> None:
    assert searches(2.0**power, committed=False) == 0


@pytest.mark.parametrize(("power", "most"), [(10, 10), (3, 3), (0, 1), (-2, 1)])
def test_a_search_that_comes_down_to_one_has_found_nothing(power: int, most: int) -> None:
    assert searches(2.0**power, committed=False) == most


@pytest.mark.parametrize(("power", "most"), [(4, 4), (1, 2), (0, 7), (-3, 7)])
def test_neither_has_one_that_comes_down_to_one_from_above(power: int, most: int) -> None:
    assert searches(2.0**power, committed=True) == most


def test_a_scale_that_has_grown_there_by_itself_is_left_alone() -> None:
    assert searches(2.0**40, committed=True) == 7


def test_after_a_good_step_seven_halvings_are_enough_and_smaller_steps_may_be_more() -> None:
    assert searches(1024.0, committed=True) == 7
    assert 7 < searches(1024.0, factor=0.7, committed=True) < 16
    assert searches(1024.0, factor=1.0, committed=True) == 16


def test_a_scale_of_zero_is_no_search_for_long() -> None:
    assert not is_search(0.0, after(1024.0, 9))


def test_what_was_given_up_for_another_reason_is_not_counted() -> None:
    assert skipped_before(after(None, 0)) == {"num_skipped": 0, "scale_before": None}
    history = after(1024.0, 3)
    assert skipped_before(history) == {"num_skipped": 3, "scale_before": 1024.0}
    history.aborted()
    assert skipped_before(history)["num_skipped"] == 0
