"""What an undone update held is told while it is there, and completed by what it should have held."""

from __future__ import annotations

import math

import pytest
import torch

from finitune.core.types import Finding
from finitune.engine.codes_time import NOT_REPRODUCED, STEP_UNREACHABLE
from finitune.engine.conditions import AS_CONFIGURED
from finitune.engine.spoilt import MAX_PLACES, parted_at, places, suspects, way_back

NAN = math.nan


def state(**changes: tuple[tuple[int, ...], float]) -> dict[str, torch.Tensor]:
    """Two weights with Adam's moments; ``changes``: a value put into one of them (``__`` stands for ``|``)."""
    torch.manual_seed(0)
    made = {}
    for name in ("a", "b"):
        made |= {name: torch.randn(4, 3) / 50, f"{name}|exp_avg": torch.randn(4, 3) / 1e3}
        made |= {f"{name}|exp_avg_sq": torch.rand(4, 3) / 1e6}
    for name, (index, value) in changes.items():
        made[name.replace("__", "|")][index] = value
    return made


@pytest.mark.parametrize("value", [1e30, -1e30, NAN, math.inf, -math.inf])
def test_a_weight_is_told_with_index_and_value(value: float) -> None:
    told = places(state(b=((2, 1), value)).items(), ["b"])
    assert [(p["name"], p["index"], p["num_bad"]) for p in told] == [("b", [2, 1], 1)]
    assert told[0]["value"] == pytest.approx(value, nan_ok=True)


def test_the_moment_that_spoilt_a_weight_comes_before_it() -> None:
    told = places(state(a=((0, 2), NAN), a__exp_avg_sq=((0, 2), -1e-9)).items(), ["a"])
    assert [p["name"] for p in told] == ["a|exp_avg_sq", "a"]
    assert told[0]["value"] == pytest.approx(-1e-9)


def test_many_large_values_are_told_by_the_largest() -> None:
    tensors = {"a": torch.full((40,), 1e19)}
    tensors["a"][7] = 2e19
    [told] = places(tensors.items(), ["a"])
    assert (told["index"], told["num_bad"]) == ([7], 1)


def test_not_more_than_a_few_are_told_and_unknown_names_are_left_out() -> None:
    tensors = {f"w{i}": torch.tensor([NAN]) for i in range(9)}
    assert len(places(tensors.items(), list(tensors))) == MAX_PLACES
    assert places(tensors.items(), ["gone"]) == []


def test_the_value_that_it_should_have_held_comes_from_the_state_computed_anew() -> None:
    told = places(state(b=((2, 1), 1e30)).items(), ["b"])
    [found] = suspects(told, state())
    assert (found.kind, found.name) == ("parameter", "b")
    assert found.data["was"] == float(state()["b"][2, 1])
    [moment] = suspects([{"name": "a|exp_avg", "index": [0, 0], "value": NAN}], {})
    assert (moment.kind, moment.data["was"], moment.data["parameter"]) == ("moment", None, "a")


@pytest.mark.parametrize("nothing", [None, 3, "b", [], [None, {"index": [0]}]])
def test_what_is_no_list_of_places_gives_nothing(nothing: object) -> None:
    assert suspects(nothing, state()) == ()


def test_where_two_lines_part_the_run_goes_back_to_the_last_common_step() -> None:
    reason = NOT_REPRODUCED.find("step 28: loss", step=28, what="loss", was="1", now="2")
    assert parted_at(reason) == 28
    plan = way_back(28, 31, AS_CONFIGURED)
    assert (plan.remedy, plan.to_step, plan.data) == ("roll_back", 27, {"to_step": 27, "steps": 4})


@pytest.mark.parametrize("reason", [STEP_UNREACHABLE.find("step 3", step=3, reason="x"), NOT_REPRODUCED.find("x")])
def test_any_other_failure_of_a_redo_shows_no_way_back(reason: Finding) -> None:
    assert parted_at(reason) is None
