"""Scale trajectory: a search is silent, a fall is not."""

from __future__ import annotations

import math
from types import ModuleType

import pytest

from finitune.core.robust import History
from finitune.core.types import Finding, Reading, Severity
from finitune.detectors import scale_trajectory
from finitune.detectors.scale_trajectory import Config, detect


def said_of(traces: ModuleType, pattern: str, scale: float = 65536.0) -> list[tuple[int, Finding]]:
    """One letter a try: "x" overflowed, "." was committed, "g" was committed and doubled the scale."""
    readings = []
    for i, letter in enumerate(pattern):
        norm = math.inf if letter == "x" else 1.0
        readings.append(Reading(step=i + 1, loss=2.0, grad_norm=norm, loss_scale=scale))
        scale *= {"x": 0.5, "g": 2.0}.get(letter, 1.0)
    return traces.show(readings, traces.of(scale_trajectory))


@pytest.mark.parametrize("num_skips", range(17))
def test_the_search_at_the_start_is_silent(traces: ModuleType, num_skips: int) -> None:
    assert said_of(traces, "x" * num_skips + "." * 100, 2.0**24) == []
    assert said_of(traces, "x.xx.x..x" + "x" * num_skips + "." * 100, 2.0**24) == []


@pytest.mark.parametrize("every", [10, 50, 200])
def test_a_scale_that_is_tried_higher_now_and_then_is_silent(traces: ModuleType, every: int) -> None:
    assert said_of(traces, ("." * (every - 2) + "gx") * (1000 // every)) == []


def test_more_than_a_quarter_of_twenty_tries_is_told(traces: ModuleType) -> None:
    said = said_of(traces, "." * 60 + "x..x..x..x..x..x")
    assert [(step, f.data["overflows"]) for step, f in said] == [(76, 6)]
    assert (said[0][1].severity, said[0][1].veto) == (Severity.WARNING, False)


def test_a_quarter_is_not(traces: ModuleType) -> None:
    assert said_of(traces, "." * 60 + "x...x...x...x..." + "." * 60) == []


def test_a_slow_slide_is_told_after_eight_halvings(traces: ModuleType) -> None:
    said = said_of(traces, "." * 60 + "x......" * 9)
    assert said
    assert said[0][1].data["highest_scale"] / said[0][1].data["loss_scale"] == 2.0**8


def test_only_overflows_speak(traces: ModuleType) -> None:
    steps = [step for step, _ in said_of(traces, "." * 60 + "xx.x.xx.x.xx.x" + "." * 30)]
    assert steps
    assert max(steps) <= 74


@pytest.mark.parametrize("scale", [None, 0.0, -1.0, math.nan, math.inf])
def test_what_is_no_scale_says_nothing(scale: float | None) -> None:
    history = History()
    for _ in range(40):
        history.committed(2.0, 1.0, loss_scale=65536.0)
    for _ in range(12):
        history.overflowed()
    assert detect(history, Reading(step=60, loss=2.0, grad_norm=math.inf, loss_scale=scale), Config()) is None
    assert detect(history, Reading(step=60, loss=2.0, grad_norm=math.inf, loss_scale=16.0), Config()) is not None


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_no_matter_of_the_scale(loss: float) -> None:
    history = History()
    for _ in range(40):
        history.committed(2.0, 1.0, loss_scale=65536.0)
    for _ in range(12):
        history.overflowed()
    assert detect(history, Reading(step=60, loss=loss, grad_norm=math.nan, loss_scale=16.0), Config()) is None


def test_a_scaler_that_begins_anew_searches_in_silence(traces: ModuleType) -> None:
    """A new GradScaler in the middle of a run: 65536 again, where 64 is right."""
    readings = []
    for i, scale in enumerate([64.0] * 40 + [65536.0 / 2**k for k in range(10)] + [64.0] * 40):
        readings.append(Reading(step=i + 1, loss=2.0, grad_norm=math.inf if scale > 64.0 else 1.0, loss_scale=scale))
    assert traces.show(readings, traces.of(scale_trajectory)) == []
