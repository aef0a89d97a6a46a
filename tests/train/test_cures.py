"""Cure by cause, the quick slice: each fault once, what it is called, where it is, what is done, what it costs.

The faults are those of ``benchmarks/cures.py``: functions of the data, the state or the recipe.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import pytest

import cures
import cures_runs
from cures_faults import CONTROLS, FAULTS, Fault
from cures_runs import Ran, Setting

FAULT = {f.name: f for f in (*FAULTS, *CONTROLS)}
SEED = 1
SHORT = {"masked row": ("max_steps=64",), "learning rate too high": ("max_steps=45",)}
STEPS = ("max_steps=60",)
pytestmark = [pytest.mark.usefixtures("quick_plan"), pytest.mark.filterwarnings("ignore")]

Sides = Callable[[str], tuple[Ran, Ran]]


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Sides:
    """Ours with a fault, and the clean run, which faults that need no other settings share."""

    def setting(fault: Fault) -> Setting:
        home = tmp_path_factory.mktemp("cures")
        return Setting(fault, SEED, home, SHORT.get(fault.name, STEPS))

    @functools.cache
    def clean(common: tuple[str, ...], _clean: tuple[str, ...], name: str) -> Ran:
        return cures_runs.clean(setting(FAULT[name]))

    shared: dict[tuple[tuple[str, ...], ...], str] = {}

    def run(name: str) -> tuple[Ran, Ran]:
        fault = FAULT[name]
        key = (tuple(fault.common), tuple(fault.clean))
        return cures_runs.ours(setting(fault)), clean(*key, shared.setdefault(key, name))

    return run


def percent(ours: Ran, clean: Ran) -> float:
    return 100 * (ours.loss / clean.loss - 1)


def healthy(ours: Ran) -> None:
    """No weight was left non-finite by any step, and the run came to its end."""
    assert ours.status == "finished"
    assert ours.bad == 0
    assert ours.bad_after == ()
    assert math.isfinite(ours.loss)


def test_an_activation_overflow_is_met_with_fp32_for_its_modules_and_not_with_a_smaller_rate(sides: Sides) -> None:
    ours, clean = sides("activation overflow")
    healthy(ours)
    assert ours.story
    for incident in ours.story:
        assert incident["code"] in ("NUM400", "NUM401")
        assert incident["where"].endswith(("mlp.down_proj", "self_attn.o_proj"))
        assert incident["remedy"] == "fp32_modules"
        assert incident["steps lost"] == 0
    assert abs(percent(ours, clean)) < 1.5


@pytest.mark.parametrize("name", ["inf loss weight", "NaN in the backward"])
def test_a_bad_row_is_left_out_for_good_and_nothing_else_is(sides: Sides, name: str) -> None:
    ours, clean = sides(name)
    healthy(ours)
    assert 1 <= len(ours.story) <= len(ours.planted.where)
    for incident in ours.story:
        # The row's weight is the data's fault; a gradient that a module makes NaN from sound numbers is the module's.
        if name == "inf loss weight":
            assert (incident["code"], incident["where"] in ours.planted.where) == ("DAT401", True)
        else:
            assert incident["code"] in ("NUM403", "NUM405")
            assert incident["where"] in ours.planted.says
        assert incident["remedy"] == "skip_rows"
    assert percent(ours, clean) < 1.0


def test_a_batch_without_anything_supervised_is_no_incident(sides: Sides) -> None:
    ours, clean = sides("masked row")
    healthy(ours)
    # In batches of one row another may stand out: that is looked into, and let pass.
    assert all(i["code"] == "NUM406" and i["remedy"] == "let_pass" for i in ours.story)
    assert not any(row in str(i["rows"]) for i in ours.incidents for row in ours.planted.where)
    assert percent(ours, clean) < 2.0


def test_a_rate_that_is_far_too_high_is_proved_and_lowered_from_before_the_rise(sides: Sides) -> None:
    ours, clean = sides("learning rate too high")
    healthy(ours)
    (incident,) = ours.story
    assert (incident["trigger"], incident["code"], incident["remedy"]) == ("runaway", "OPT401", "lower_lr")
    # The gradients were clipped all along: that is no fault of the optimizer.
    assert [d["code"] for d in ours.incidents[0]["diagnosis"]] == ["OPT401"]
    assert ours.loss < 1.5 * clean.loss


@pytest.mark.parametrize("name", ["NaN in a moment", "NaN in a weight", "1e30 in a weight"])
def test_a_state_that_was_overwritten_is_put_right_without_losing_a_step(sides: Sides, name: str) -> None:
    ours, clean = sides(name)
    assert ours.status == "finished"
    assert ours.bad == 0
    # What was put in from outside stands until the next step; no later step leaves any of it.
    assert len(ours.bad_after) <= 1
    (incident,) = ours.story
    assert incident["code"] in ("SYS403", "SYS400")
    assert incident["where"] in (*ours.planted.where, "")
    assert incident["remedy"] in ("repair_tensor", "reset_moments", "retry")
    assert incident["steps lost"] == 0
    assert abs(percent(ours, clean)) < 0.5


@pytest.mark.parametrize("name", [f.name for f in CONTROLS])
def test_without_a_fault_the_guarded_run_is_the_unguarded_one_bit_for_bit(tmp_path: Path, name: str) -> None:
    found = cures.control(FAULT[name], 0, tmp_path, "max_steps=40")
    assert found["bit-identical"]
    assert found["incidents"] == []
