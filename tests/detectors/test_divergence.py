"""Divergence: finite, far above the start, and staying there."""

from __future__ import annotations

import math
from types import ModuleType

import pytest

from finitune.core.types import Reading
from finitune.detectors import divergence


def said_of(traces: ModuleType, losses: list[float]) -> list[int]:
    readings = [Reading(step=i + 1, loss=loss, grad_norm=1.0) for i, loss in enumerate(losses)]
    found = traces.show(readings, traces.of(divergence))
    assert not any(f.veto for _, f in found)
    return [step for step, _ in found]


def test_a_destroyed_model_is_reported_after_thirty_two_high_losses(traces: ModuleType) -> None:
    assert said_of(traces, [2.4] * 10 + [7.0] * 40) == list(range(43, 51))


def test_a_loss_that_comes_back_is_no_divergence(traces: ModuleType) -> None:
    assert said_of(traces, [2.4] + ([7.0] * 31 + [2.0]) * 4) == []


def test_an_easy_first_batch_among_noisy_ones_is_no_divergence(traces: ModuleType) -> None:
    """The first loss is a single batch: here half of the batches are easy."""
    assert said_of(traces, [0.5, 3.0] * 60) == []


def test_a_small_start_needs_a_rise_of_a_whole_nat(traces: ModuleType) -> None:
    assert said_of(traces, [0.05] + [0.8] * 60) == []
    assert said_of(traces, [0.05] + [1.2] * 60) != []


@pytest.mark.parametrize("first", [math.nan, 0.0, -2.0])
def test_without_a_positive_start_there_is_nothing_to_compare_with(traces: ModuleType, first: float) -> None:
    losses = [first] + [9.0] * 60 if math.isfinite(first) else [first] * 60
    assert said_of(traces, losses) == []


def test_the_largest_numbers_do_not_raise(traces: ModuleType) -> None:
    assert said_of(traces, [1.0] + [1.7976931348623157e308] * 40) != []
