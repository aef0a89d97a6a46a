"""Rates, intervals and summaries from records."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finitune.bench.score import KEYS, by_name, scored, summary, whole, wilson


def fault(**changes: Any) -> dict[str, Any]:
    record = {
        "key": "faults/a/0/finitune",
        "kind": "faults",
        "name": "a",
        "seed": 0,
        "contender": "finitune",
        "detected": True,
        "poisoned_steps": 0,
        "poisoned_weight_steps": 0,
        "poisoned_checkpoints": 0,
        "place": True,
        "cause": "right",
        "remedy": True,
        "cured": True,
        "incidents": [{}],
        "replays": 10.0,
    }
    return record | changes


def control(**changes: Any) -> dict[str, Any]:
    record = {"key": "controls/c/0/finitune", "kind": "controls", "name": "c", "seed": 0, "contender": "finitune"}
    return record | {"steps": 1000, "findings": 0, "interventions": 0, "same_bits": True} | changes


def test_wilson_is_the_published_interval() -> None:
    """81 of 263: 25.5 % to 36.6 % (Newcombe 1998, table I, method 3)."""
    low, high = wilson(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


@given(st.integers(0, 200), st.integers(1, 200))
def test_wilson_holds_the_rate_and_stays_within_bounds(hits: int, count: int) -> None:
    hits = min(hits, count)
    low, high = wilson(hits, count)
    assert 0.0 <= low <= hits / count <= high <= 1.0
    assert low < high


def test_wilson_of_nothing_is_nothing() -> None:
    assert wilson(0, 0) is None


def test_every_fault_counts_once() -> None:
    records = [
        fault(),
        fault(detected=False, place=False, cause=None, cured=False, remedy=False, incidents=[]),
        fault(cause="wrong", place=None, cured=None, poisoned_steps=3, poisoned_weight_steps=2, poisoned_checkpoints=1),
        fault(cause="unknown", remedy=None),
    ]
    score = summary(records)
    assert score["detection_rate"] == 3 / 4
    assert score["place_accuracy"] == 2 / 3
    # No cause at all counts as "unknown".
    assert (score["cause_top1"], score["cause_wrong"], score["cause_unknown"]) == (1 / 4, 1 / 4, 2 / 4)
    assert score["cured_within_1pct"] == 2 / 3
    assert score["poisoned_weight_steps"] == 2
    assert (score["poisoned_steps"], score["poisoned_trusted_checkpoints"]) == (3, 1)


def test_skipped_and_broken_cases_count_for_nothing_but_are_told() -> None:
    records = [fault(), {**fault(), "skipped": "absent"}, {"key": "k", "kind": "faults", "name": "b", "defect": "x"}]
    assert len(scored(records)) == 1
    score = summary(records)
    assert (score["cases"], score["skipped"], score["defects"]) == (1, 1, 1)


def test_healthy_runs_are_counted_in_steps() -> None:
    score = summary([control(findings=1), control(steps=3000, interventions=2, same_bits=False)])
    assert score["findings_per_10k_healthy"] == pytest.approx(2.5)
    assert score["interventions_healthy"] == 2
    assert score["healthy"]["bit_identical"]["value"] == 0.5
    assert score["detection_rate"] is None


def test_the_overhead_is_the_median_of_what_is_above_one() -> None:
    overheads = [{"kind": "overhead", "name": "m", "ratio": r} for r in (1.01, 1.03, 1.02)]
    assert math.isclose(summary(overheads)["overhead_median"], 0.02)


def test_the_whole_has_the_promised_keys_for_every_side_and_case() -> None:
    records = [fault(), fault(contender="plain"), control()]
    score = whole(records, "finitune")
    assert set(score["summary"]) == set(KEYS)
    assert set(score["contenders"]) == {"finitune", "plain"}
    for side in (*score["contenders"].values(), *by_name(records).values(), *score["cases"]["plain"].values()):
        assert set(KEYS) <= set(side)
