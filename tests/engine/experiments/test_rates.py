"""Which rate the run bore, and since when it is a higher one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from finitune.core.incident import Trigger
from finitune.core.types import Finding, Reading, Severity
from finitune.engine.case import Case
from finitune.engine.experiments._rates import MAX_STEPS, Raised, exact, raised, raised_in

LEVEL = [1e-3] * 20


def test_a_jump_is_seen_with_the_rate_of_before_and_the_updates_since() -> None:
    assert raised([*LEVEL, 0.1, 0.1, 0.1]) == (Raised(3, 1e-3, 0.1),)


def test_a_climb_begins_where_it_left_the_level() -> None:
    climb = [1e-3 * 1.3**k for k in range(1, 11)]
    assert raised([*LEVEL, *climb]) == (Raised(10, 1e-3, pytest.approx(climb[-1])),)


def test_a_rate_that_was_high_for_a_moment_only_counts() -> None:
    assert [r.num_updates for r in raised([*LEVEL, 0.5, 1e-3, 1e-3])] == [3]


def test_of_several_stairs_the_newest_comes_first() -> None:
    assert [(r.num_updates, r.borne) for r in raised([*LEVEL, *[0.01] * 5, *[0.1] * 2])] == [(2, 0.01), (7, 1e-3)]


def test_a_decay_is_a_level_too_and_its_top_is_what_was_borne() -> None:
    decay = [1e-2 * (1 + math.cos(math.pi * k / 40)) / 2 for k in range(30)]
    assert [(r.num_updates, r.borne) for r in raised([*decay, 0.5])] == [(1, 1e-2)]


@pytest.mark.parametrize(
    "rates",
    [
        pytest.param([1e-5 * k for k in range(1, 60)], id="warm-up"),
        pytest.param([*[1e-5 * k for k in range(1, 20)], *[2e-4] * 20], id="warm-up, then constant"),
        pytest.param([*LEVEL, *[1.4e-3] * 5], id="hardly more"),
        pytest.param([1e-2 * (1 + math.cos(math.pi * (k % 30) / 30)) / 2 for k in range(70)], id="restarts"),
        pytest.param([1e-3, 1e-3, 0.1], id="no level yet"),
        pytest.param([*LEVEL, *[0.1] * (MAX_STEPS + 1)], id="long ago"),
        pytest.param([], id="nothing known"),
    ],
)
def test_what_rises_as_schedules_do_or_long_ago_is_no_raise(rates: list[float]) -> None:
    assert raised(rates) == ()


def test_a_rate_has_the_bits_it_was_set_with_though_its_logarithm_was_kept() -> None:
    for rate in (1e-3, 3e-4, 2e-5, 5e-6):
        assert exact(math.exp(math.log(rate))) == rate


def test_the_rate_of_the_failing_update_itself_counts_where_the_update_failed() -> None:
    reading = Reading(21, 3.0, 1.0, lr=math.nan)
    case = Case(Trigger.UPDATE, Finding("NUM101", Severity.ERROR), reading, past={"recent_rates": LEVEL})
    assert raised_in(case) == (Raised(1, 1e-3, math.inf),)
    assert raised_in(replace(case, trigger=Trigger.LOSS)) == ()
    assert raised_in(replace(case, past={"recent_rates": [*LEVEL, math.nan, "x"]})) == raised_in(case)
