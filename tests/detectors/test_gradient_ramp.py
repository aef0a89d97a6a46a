"""Gradient ramp: a climb is told before the blow-up, and neither noise nor a new level is a climb."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from types import ModuleType

import pytest

from finitune.core.robust import History
from finitune.core.types import Finding, Reading, Severity
from finitune.detectors import gradient_ramp
from finitune.detectors.gradient_ramp import Config, detect


def said_of(traces: ModuleType, norms: list[float]) -> list[tuple[int, Finding]]:
    readings = [Reading(step=i + 1, loss=2.0, grad_norm=n) for i, n in enumerate(norms)]
    return traces.show(readings, traces.of(gradient_ramp))


def calm(seed: int, num_steps: int = 80, sigma: float = 0.2) -> list[float]:
    numbers = random.Random(seed)
    return [math.exp(sigma * numbers.gauss(0, 1)) for _ in range(num_steps)]


def test_a_ramp_before_the_blow_up_is_told(traces: ModuleType) -> None:
    """Four steps of a climbing norm, as the chronicles of a 176B run tell; the fifth would be the blow-up."""
    for seed in range(40):
        norms = calm(seed)
        highest = max(norms[-64:])
        said = said_of(traces, [*norms, *(highest * 1.1 * 1.45**i for i in range(4))])
        # The step before it may have been in order by chance.
        assert [step for step, _ in said] in ([84], [83, 84]), seed
        assert said[0][1].severity is Severity.WARNING
        assert not said[0][1].veto


def test_ramps_of_many_rates_are_told_before_the_norm_is_ten_times_the_usual(traces: ModuleType) -> None:
    for seed in range(60):
        numbers = random.Random(seed)
        norms = calm(seed, sigma=numbers.uniform(0.05, 0.3))
        rate, level = numbers.uniform(1.15, 1.6), max(norms)
        while level < 10.0:
            level *= rate
            norms.append(level)
        said = said_of(traces, norms)
        assert said, seed
        assert said[0][0] <= len(norms), seed


@pytest.mark.parametrize("level", [3.0, 10.0, 100.0])
def test_a_new_level_that_stays_is_no_ramp(traces: ModuleType, level: float) -> None:
    for seed in range(40):
        assert said_of(traces, calm(seed) + [level * n for n in calm(1000 + seed)]) == [], seed


def test_a_warm_up_is_no_ramp(traces: ModuleType) -> None:
    """Norms that grow tenfold in 40 steps, from the first step on and in the middle of the run."""
    for seed in range(20):
        noise = calm(seed, 200)
        growing = [n * (1 + 9 * min(1.0, i / 40)) for i, n in enumerate(noise)]
        assert said_of(traces, growing) == [], seed


def test_a_smooth_slow_growth_is_no_ramp(traces: ModuleType) -> None:
    assert said_of(traces, [1.01**i for i in range(300)]) == []


def test_the_first_steps_are_not_judged(traces: ModuleType) -> None:
    assert said_of(traces, [1.0] * 19 + [2.0, 3.0, 4.5, 6.75]) == []
    assert said_of(traces, [1.0] * 40 + [2.0, 3.0, 4.5, 6.75]) != []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_what_has_no_logarithm_is_not_judged_and_does_not_break_a_ramp(traces: ModuleType, bad: float) -> None:
    norms = [1.0] * 40 + [2.0, 3.0, bad, 4.5, 6.75]
    assert [step for step, _ in said_of(traces, norms)] == [45]


def test_a_loss_that_is_not_finite_is_for_others() -> None:
    history = History()
    for norm in [1.0] * 40 + [2.0, 3.0, 4.5]:
        history.committed(2.0, norm)
    reading = Reading(step=44, loss=2.0, grad_norm=6.75)
    assert detect(history, reading, Config()) is not None
    assert detect(history, replace(reading, loss=math.nan), Config()) is None


def test_the_numbers_tell_the_climb(traces: ModuleType) -> None:
    found = said_of(traces, [1.0] * 40 + [2.0, 3.0, 4.5, 6.75])[0][1]
    assert found.data["count"] == 4
    assert found.data["times"] == pytest.approx(6.75)
    assert found.data["highest"] == pytest.approx(1.0)
