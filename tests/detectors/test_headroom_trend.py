"""Headroom trend: what is foretold, as a range, and what is not."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from types import ModuleType

import pytest

from finitune.core.codes import fill
from finitune.core.robust import History
from finitune.core.types import Finding, Reading, Severity
from finitune.detectors import headroom_trend
from finitune.detectors._groups import loudest_group, ranges
from finitune.detectors.headroom_trend import Config, detect

# The real one: a 135M model in fp16, linear warm-up to 1e-3, NaN at step 159 (step, bits).
REAL = ((0, 0.26), (20, 0.23), (40, 0.19), (70, 0.07), (90, 0.04), (110, 0.11), (130, 0.015), (158, 0.003))


def said_of(traces: ModuleType, bits: list[float], every: int = 1) -> list[tuple[int, Finding]]:
    """``every``: only each so-many-th step was looked at."""
    readings = [
        Reading(step=i + 1, loss=2.0, grad_norm=1.0, headroom_bits=b if i % every == 0 else None)
        for i, b in enumerate(bits)
    ]
    return traces.show(readings, traces.of(headroom_trend))


def real_bits(noise: float, seed: int) -> list[float]:
    """The measured points joined by lines; the noise is one-sided, because they are minima."""
    numbers = random.Random(seed)
    lines = [b0 + (b1 - b0) * (s - s0) / (s1 - s0) for (s0, b0), (s1, b1) in pairwise(REAL) for s in range(s0, s1)]
    return [b + noise * abs(numbers.gauss(0, 1)) for b in lines]


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.02])
def test_the_real_overflow_is_foretold_long_before_it_comes(traces: ModuleType, noise: float) -> None:
    for seed in range(8):
        said = said_of(traces, real_bits(noise, seed))
        assert said, seed
        first_step, found = said[0]
        assert 20 <= 159 - first_step <= 110, (seed, first_step)
        assert found.severity is Severity.WARNING
        assert not found.veto


def falling(seed: int) -> list[float]:
    """A random fall through 0 bits, noise and all."""
    numbers = random.Random(seed)
    start, rate, noise = numbers.uniform(2.5, 6.0), numbers.uniform(0.02, 0.09), numbers.uniform(0.0, 0.1)
    bits, level = [], start
    while level > 0:
        bits.append(max(1e-3, level + noise * abs(numbers.gauss(0, 1))))
        level -= rate
    return bits


def test_falls_of_many_rates_are_foretold_ten_steps_ahead_and_inside_the_range(traces: ModuleType) -> None:
    inside, told = 0, 0
    for seed in range(60):
        bits = falling(seed)
        said = said_of(traces, bits)
        assert said, seed
        assert len(bits) - said[0][0] >= 10, seed
        for step, found in said:
            told += 1
            inside += found.data["steps_low"] <= len(bits) - step <= found.data["steps_high"]
    assert inside >= 0.9 * told


def test_it_speaks_once_in_ten_measurements(traces: ModuleType) -> None:
    steps = [step for step, _ in said_of(traces, [2.5 - 0.02 * i for i in range(125)])]
    assert len(steps) > 2
    assert all(b - a == 10 for a, b in pairwise(steps))


def test_steps_count_where_not_every_step_is_looked_at(traces: ModuleType) -> None:
    bits = [2.5 - 0.008 * i for i in range(312)]
    said = said_of(traces, bits, every=5)
    assert said
    for step, found in said:
        assert found.data["per_step"] == pytest.approx(0.008, rel=0.05)
        assert found.data["steps_low"] <= len(bits) - step <= found.data["steps_high"]


def test_above_two_bits_a_fall_is_normal_growth(traces: ModuleType) -> None:
    assert said_of(traces, [8.0 - 0.05 * i for i in range(119)]) == []


def test_growth_that_comes_to_rest_is_not_foretold_to_overflow_for_ever(traces: ModuleType) -> None:
    bits = [1.5 + 3.0 * math.exp(-i / 20) for i in range(400)]
    assert all(step < 100 for step, _ in said_of(traces, bits))


def test_a_start_close_to_the_limit_alone_is_the_note_of_another(traces: ModuleType) -> None:
    """NUM030 tells that there is little room; here only that it shrinks."""
    numbers = random.Random(3)
    assert said_of(traces, [1.34 + 0.05 * numbers.gauss(0, 1) for _ in range(400)]) == []
    assert said_of(traces, [0.3] * 200) == []


def test_a_fall_at_once_is_no_trend(traces: ModuleType) -> None:
    """Modules that were kept in fp32 are given back."""
    assert said_of(traces, [2.2] * 60 + [0.8] * 120) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -0.5, None])
def test_what_is_no_headroom_says_nothing_and_spoils_nothing(traces: ModuleType, bad: float | None) -> None:
    bits = [2.5 - 0.02 * i for i in range(125)]
    clean = said_of(traces, bits)
    readings = []
    for i, b in enumerate(bits):
        readings.append(Reading(step=i + 1, loss=2.0, grad_norm=1.0, headroom_bits=b))
        if i % 7 == 3:
            readings.append(Reading(step=i + 1, loss=2.0, grad_norm=1.0, headroom_bits=bad))
    said = traces.show(readings, traces.of(headroom_trend))
    if bad is None or not math.isfinite(bad):
        assert said
        # The steps of the odd readings pass, too, so that the fall is a little slower for each.
        assert abs(said[0][0] - clean[0][0]) <= 10


def test_the_group_of_modules_is_named_in_both_languages(traces: ModuleType) -> None:
    said = traces.show(traces.sloping_headroom(), traces.of(headroom_trend))
    _, found = said[0]
    assert found.where == "model.layers.11.mlp.down_proj"
    assert "mlp.down_proj of layers 11-13" in fill(headroom_trend.FORECAST.en.what, found.data)
    assert "第 11-13 层的 mlp.down_proj" in fill(headroom_trend.FORECAST.zh.what, found.data)
    assert found.data["steps_low"] < found.data["steps_high"]


def test_a_loss_that_is_not_finite_is_no_time_for_forecasts() -> None:
    history = History()
    for i in range(60):
        history.committed(2.0, 1.0, headroom_bits=2.5 - 0.03 * i)
    reading = Reading(step=61, loss=math.nan, grad_norm=1.0, headroom_bits=0.7)
    assert detect(history, reading, Config(every_steps=1)) is None
    assert detect(history, Reading(step=61, loss=2.0, grad_norm=1.0, headroom_bits=0.7), Config(every_steps=1))


def test_only_modules_of_the_same_kind_and_near_the_worst_are_named() -> None:
    amax = {f"model.layers.{k}.mlp.down_proj": 30000.0 for k in (3, 5, 6, 7)}
    amax |= {"model.layers.9.mlp.down_proj": 900.0, "model.layers.4.self_attn": 29000.0, "lm_head": 20.0}
    group = loudest_group(amax | {"model.layers.6.mlp.down_proj": 31000.0})
    assert group is not None
    assert group.modules[0] == "model.layers.6.mlp.down_proj"
    assert (group.part, group.layers) == ("mlp.down_proj", "3, 5-7")


@pytest.mark.parametrize("worst", [math.nan, math.inf])
def test_the_worst_of_all_is_what_is_not_finite(worst: float) -> None:
    group = loudest_group({"model.layers.0": 5.0, "model.layers.1": worst, "head": 9.0})
    assert group is not None
    assert group.modules == ("model.layers.1",)
    assert (group.part, group.layers) == ("output", "1")


def test_names_without_a_layer_stand_for_themselves() -> None:
    group = loudest_group({"lm_head": 7.0, "embed": 1.0})
    assert group is not None
    assert (group.modules, group.part, group.layers) == (("lm_head",), "lm_head", "-")
    assert loudest_group({}) is None


def test_ranges_of_numbers() -> None:
    assert ranges([7, 3, 5, 6, 6]) == "3, 5-7"
    assert ranges([]) == ""
