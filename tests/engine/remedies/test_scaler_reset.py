"""Scaler reset: a scale that was good and loses nothing, from the first batch that was given up for want of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine.causes.scenes import DOWN, OF_CAUSES, evidence
from engine.remedies.test_plans import again, plans
from finitune.engine.case import Case
from finitune.engine.conditions import Conditions


def test_the_scale_is_set_to_what_was_good_and_its_floor_goes_down_with_it() -> None:
    of = OF_CAUSES["backward_overflow"]
    (plan,) = plans("scaler_reset", of)
    assert (plan.conditions.max_scale, plan.conditions.min_scale, plan.to_step) == (1.0, 2.0**-4, None)
    assert plan.temporary
    assert plans("scaler_reset", of, Conditions(max_scale=1.0)) == []
    assert not plans("scaler_reset", again(of, "scaler_reset"))[0].temporary
    (low,) = plans("scaler_reset", scaled(scale=2.0**-10, suits=True))
    assert (low.conditions.max_scale, low.conditions.min_scale, low.temporary) == (2.0**-10, 2.0**-10, False)


def scaled(*more: str, **numbers: Any) -> Case:
    """A backward overflow whose search came to these numbers."""
    told = {"good_at": [2.0**-24, 2.0**-8], "bad_at": [8.0], **numbers}
    found = evidence(" ".join(("scan_state fp32 loss_scales", *more)), "", loss_scales=told)
    return replace(OF_CAUSES["backward_overflow"], evidence=found)


def test_a_scale_at_which_gradients_are_lost_is_none_and_neither_is_one_that_one_module_alone_asks_for() -> None:
    assert plans("scaler_reset", scaled(scale=2.0**-10, suits=False)) == []
    assert plans("scaler_reset", scaled("islands", scale=2.0**-10, suits=True)) == []


def test_batches_that_were_given_up_while_a_scale_was_sought_are_trained_on() -> None:
    assert plans("scaler_reset", scaled(scale=1.0, suits=True, back_to=20))[0].to_step == 20
    of = scaled("islands", scale=2.0**-10, suits=False, back_to=20)
    of = replace(of, evidence={**of.evidence, **evidence("islands", "", islands={"modules": [DOWN]})})
    assert [p.to_step for p in plans("fp32_modules", of)][:1] == [20]
