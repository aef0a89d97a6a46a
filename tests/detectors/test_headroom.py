"""Headroom: a forecast of fp16 overflow, never a veto."""

from __future__ import annotations

import math

import pytest

from finitune.core.robust import History
from finitune.core.types import Finding, Reading, Severity
from finitune.detectors import headroom
from finitune.detectors.headroom import Config, detect


def judge(bits: float | None, first_bits: float = math.nan, **fields: object) -> Finding | None:
    history = History()
    if not math.isnan(first_bits):
        history.committed(2.0, 1.0, headroom_bits=first_bits)
    reading = Reading(step=9, loss=2.0, grad_norm=1.0, headroom_bits=bits, **fields)  # type: ignore[arg-type]
    return detect(history, reading, Config())


@pytest.mark.parametrize("bits", [0.49, 0.0, -1.0, -math.inf, math.nan])
def test_below_half_a_bit_it_speaks_whatever_came_before(bits: float) -> None:
    found = judge(bits, first_bits=0.5)
    assert found is not None
    assert (found.code, found.severity, found.veto) == ("NUM030", Severity.NOTE, False)


def test_a_model_that_begins_close_to_the_limit_gets_a_note_at_once() -> None:
    """The real one: massive activations of 25800 leave 1.34 bits."""
    assert judge(1.34) is not None
    assert judge(1.34, first_bits=1.34) is None


@pytest.mark.parametrize(("first", "now", "speaks"), [(2.4, 1.8, True), (2.2, 1.8, False), (6.0, 2.1, False)])
def test_a_drop_counts_once_the_headroom_is_below_two_bits(first: float, now: float, speaks: bool) -> None:
    assert (judge(now, first_bits=first) is not None) == speaks


def test_outside_half_precision_there_is_nothing_to_say() -> None:
    assert judge(None, first_bits=3.0) is None


def test_the_worst_module_is_named_and_nan_is_the_worst() -> None:
    found = judge(0.1, amax={"a": 60000.0, "b": 5.0})
    assert found is not None
    assert found.where == "a"
    found = judge(-math.inf, amax={"a": 60000.0, "b": math.nan})
    assert found is not None
    assert found.where == "b"


def test_an_overflow_is_foretold(traces) -> None:
    """Headroom that falls by 0.05 bits a step: the note comes 20 to 80 steps before the overflow."""
    readings = [
        Reading(step=i, loss=2.0, grad_norm=1.0, headroom_bits=4.0 - 0.05 * (i - 1), amax={"down_proj": 1.0})
        for i in range(1, 81)
    ]
    first_step, _ = traces.show(readings, traces.of(headroom))[0]
    assert 20 <= 81 - first_step <= 80


def notes(traces, *bits: float) -> list[int]:
    readings = [Reading(step=i + 1, loss=2.0, grad_norm=1.0, headroom_bits=b) for i, b in enumerate(bits)]
    return [step for step, _ in traces.show(readings, traces.of(headroom))]


def test_a_run_that_stays_near_the_limit_is_told_once(traces) -> None:
    assert notes(traces, *[1.3, 1.2, 1.4] * 100) == [1]
    assert notes(traces, *[3.0, 2.5, 0.3], *[0.3, 0.2, 1.5, 0.4] * 100) == [3]


def test_every_further_half_bit_is_told(traces) -> None:
    assert notes(traces, 4.0, 1.9, 1.8, 1.41, 1.39, 1.0, 0.88, 0.51, 0.49, 0.3, 0.1, -0.02) == [2, 4, 6, 9, 12]


def test_the_same_batch_at_a_smaller_loss_scale_is_not_told_again(traces) -> None:
    tries = [Reading(1, 2.0, math.inf, loss_scale=65536.0 / 2**k, headroom_bits=1.3) for k in range(8)]
    said = traces.show([*tries, Reading(1, 2.0, 1.0, loss_scale=256.0, headroom_bits=1.3)], traces.of(headroom))
    assert len(said) == 1


def test_what_was_lowest_survives_a_save() -> None:
    history, loaded = History(), History()
    for bits in (3.0, 1.2, 1.5):
        history.committed(2.0, 1.0, headroom_bits=bits)
    loaded.load(history.state())
    assert (loaded.lowest_headroom_bits, loaded.first_headroom_bits) == (1.2, 3.0)
