"""Update ratio: told when updates become large for the weights, and then once."""

from __future__ import annotations

import math
import random
from types import ModuleType

import pytest

from finitune.core.types import Finding, Reading, Severity
from finitune.detectors import update_ratio


def said_of(traces: ModuleType, ratios: list[float | None]) -> list[tuple[int, Finding]]:
    readings = [Reading(step=i + 1, loss=2.0, grad_norm=1.0, update_ratio=r) for i, r in enumerate(ratios)]
    return traces.show(readings, traces.of(update_ratio))


def test_a_level_above_one_per_cent_is_told_once_after_eight_measurements(traces: ModuleType) -> None:
    said = said_of(traces, [3e-4] * 40 + [0.02] * 100)
    assert [step for step, _ in said] == [48]
    assert (said[0][1].severity, said[0][1].veto) == (Severity.NOTE, False)


def test_a_level_that_falls_by_itself_is_a_young_adapter(traces: ModuleType) -> None:
    """LoRA begins with B = 0, so that its first updates are large for it."""
    assert said_of(traces, [0.016 * math.exp(-i / 15) for i in range(60)]) == []


def test_a_tenth_of_the_weights_in_one_step_is_told_at_once(traces: ModuleType) -> None:
    assert [step for step, _ in said_of(traces, [1e-3, 0.26, 0.24, 0.17, 1e-3, 1e-3])] == [2]


def test_a_climb_is_told_where_it_passes_one_per_cent(traces: ModuleType) -> None:
    """A warm-up to a rate far too high, as recorded; its loss rose nine steps later."""
    recorded = [0.002, 0.002, 0.003, 0.006, 0.012, 0.02, 0.035]
    said = said_of(traces, [0.0015] * 30 + recorded)
    assert [step for step, _ in said] == [35]


def test_gaps_in_the_measurements_do_not_matter(traces: ModuleType) -> None:
    ratios: list[float | None] = [3e-4] * 20 + [0.02] * 20
    sparse = [r if k == 0 else None for r in ratios for k in range(5)]
    assert [step for step, _ in said_of(traces, sparse)] == [5 * 27 + 1]


@pytest.mark.parametrize("peak", [1e-4, 1e-3, 5e-3])
def test_a_sane_warm_up_is_silent(traces: ModuleType, peak: float) -> None:
    for seed in range(10):
        numbers = random.Random(seed)
        ratios: list[float | None] = [
            peak * min(1.0, (i + 1) / 60) * math.exp(0.2 * numbers.gauss(0, 1)) for i in range(200)
        ]
        assert said_of(traces, ratios) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -1.0, None])
def test_what_is_no_ratio_says_nothing_and_spoils_nothing(traces: ModuleType, bad: float | None) -> None:
    assert said_of(traces, [bad] * 40) == []
    if bad is None or not math.isfinite(bad):
        assert [step for step, _ in said_of(traces, [3e-4] * 40 + [0.02, bad] * 10)] == [55]
