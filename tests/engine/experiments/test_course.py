"""Courses: where the rise began, which batches are walked, and how high the rate of a walk is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.experiments.port import HalfPort, causal_loss, llama, text
from engine.experiments.zoo import lab_at
from finitune.core.incident import Trigger
from finitune.engine.conditions import NotPossible
from finitune.engine.experiments._course import (
    WALK_STEPS,
    Course,
    Walk,
    near_limit,
    since_rise,
)
from finitune.engine.lab import Lab
from finitune.engine.monitor import read
from finitune.engine.policy import Action
from finitune.engine.snapshot import as_snapshot


class LoopPort(HalfPort):
    """As in a bare loop: no batch after those that were handed over."""

    handed_over = 0

    def ahead(self) -> int:
        """Batches after the one at hand."""
        return max(0, self.handed_over - self.state.step - 1)

    def batch(self, step: int | None = None) -> Any:
        """Raises NotPossible where it is not there yet."""
        if step is None and self.state.step >= self.handed_over:
            raise NotPossible("the loop has not handed it over yet")
        return super().batch(step)


def run(
    steps: int,
    kind: type[HalfPort] = HalfPort,
    schedule: Callable[[int], float] = lambda _step: 1.0,
    *,
    trigger: Trigger = Trigger.RUNAWAY,
    losses: list[float] | None = None,
    **past: Any,
) -> Lab:
    """A sound run of so many steps, whose losses are told to have been others."""
    model = llama(layers=1)
    port = kind(model, torch.optim.SGD(model.parameters(), lr=1e-3), causal_loss, text(60), schedule=schedule)
    if isinstance(port, LoopPort):
        port.handed_over = steps if trigger is Trigger.RUNAWAY else steps + 1
    states, made, norms = {0: as_snapshot(port)}, [], []
    for _ in range(steps):
        reading = read(port.forward_backward())
        port.commit(reading)
        port.settle(Action.PROCEED, reading, clean=True)
        made.append(reading.loss)
        norms.append(reading.grad_norm)
        states[port.state.step] = as_snapshot(port)
    lab = lab_at(port, trigger, reading, states, losses or made, norms)
    known = {"recent_losses": losses or made, "updates": steps, **past}
    lab.case = replace(lab.case, past={**lab.case.past, **known})
    return lab


RISEN = [3.0] * 22 + [9.0] * 10


# -- where the rise began ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_replays", "back"), [(math.inf, 11), (26.0, 10), (24.0, 9), (12.0, 8)])
def test_a_course_goes_back_to_before_the_update_that_the_rise_began_with_as_far_as_can_be_paid(
    max_replays: float, back: int
) -> None:
    lab = run(32, losses=RISEN)
    lab.budget.max_replays = max_replays
    course = Course.of(lab, lab.case)
    assert (lab.before.step - course.start.step, course.num_back, course.usual) == (back, back, 3.0)
    assert course.proof == back + 3


def test_the_slow_beginning_of_a_rise_belongs_to_it() -> None:
    calm = [3.0, 3.1, 2.9, 3.0, 3.1, 2.9] * 3
    assert since_rise([*calm, 3.4, 3.5, 3.4, 3.8, 5.0, 9.0, 9.5], 3.0) >= 6
    assert since_rise([*calm, 9.0, 9.5], 3.0) == 2
    assert since_rise(calm, 3.0) == 0
    assert since_rise([], 3.0) == 0


def test_a_course_starts_where_the_rate_was_raised_even_if_the_loss_rose_later() -> None:
    rates = [1e-3] * 24 + [5e-3] * 16
    lab = run(40, losses=[3.0] * 36 + [9.0] * 4, recent_rates=rates)
    assert Course.of(lab, lab.case).start.step == 23


def test_further_back_is_further_back() -> None:
    lab = run(40, losses=[3.0] * 30 + [9.0] * 10)
    near, far = Course.of(lab, lab.case), Course.of(lab, lab.case, further=True)
    assert far.num_back >= near.num_back + 8


def test_a_level_that_is_back_gives_nothing_to_prove() -> None:
    lab = run(32, losses=[3.0] * 24 + [9.0] * 4 + [3.1] * 4)
    with pytest.raises(NotPossible, match="nothing to cure"):
        Course.of(lab, lab.case)


def test_a_level_half_as_high_again_is_not_near_that_of_before() -> None:
    assert near_limit([2.0, 2.05, 1.95] * 8, 2.0) == pytest.approx(2.3)
    assert near_limit([], 2.0) == pytest.approx(2.3)
    assert near_limit([1.0, 3.0] * 16, 2.0) <= 3.0, "never more than the proof of a plan allows"


def test_no_state_to_go_back_to_is_said() -> None:
    lab = run(12, losses=[3.0] * 6 + [9.0] * 6)
    lab._state_at = lambda _step: None
    lab._states = {12: lab.before}
    with pytest.raises(NotPossible, match="no state from"):
        Course.of(lab, lab.case)


# -- which batches -----------------------------------------------------------------------------------------------------


def test_our_trainer_walks_on_over_coming_batches() -> None:
    lab = run(32, losses=[3.0] * 29 + [9.0] * 3)
    course = Course.of(lab, lab.case)
    assert course._steps(lab) == [None] * (WALK_STEPS + 2)


def test_a_loop_walks_on_over_batches_of_before_the_start_each_once() -> None:
    lab = run(32, LoopPort, losses=[3.0] * 29 + [9.0] * 3)
    course = Course.of(lab, lab.case)
    steps = course._steps(lab)
    assert steps[: course.num_back] == [None] * course.num_back
    again = steps[course.num_back :]
    assert len(steps) == WALK_STEPS + 2
    assert len(set(again)) == len(again), "none twice: what is repeated is learnt by heart"
    assert all(s is not None and s <= course.start.step for s in again)


def test_the_batch_at_hand_of_a_loop_is_walked_where_its_step_was_refused() -> None:
    lab = run(32, LoopPort, trigger=Trigger.OUTLIER, losses=[3.0] * 32)
    course = Course.of(lab, lab.case)
    steps = course._steps(lab)
    assert steps[: course.num_back + 1] == [None] * (course.num_back + 1)
    assert steps[course.num_back + 1] is not None


def test_a_loop_that_has_just_begun_has_too_few_batches() -> None:
    lab = run(3, LoopPort, losses=[3.0, 9.0, 9.0], first_loss=3.0)
    lab.case = replace(lab.case, finding=replace(lab.case.finding, data={"before": 3.0}))
    course = Course.of(lab, lab.case)
    with pytest.raises(NotPossible, match="only 3 batches are at hand"):
        course.at_rate(lab, lab.case, 0.1)


# -- walks -------------------------------------------------------------------------------------------------------------


def test_a_walk_that_runs_away_ends_at_once_and_leaves_the_case_alone() -> None:
    lab = run(32, losses=[0.1] * 29 + [9.0] * 3)
    case, spent = lab.case, lab.budget.replays
    course = Course.of(lab, lab.case)
    walk = course.at_rate(lab, lab.case, 0.1)
    assert not walk.whole
    assert walk.level == math.inf
    assert lab.budget.replays - spent == 1
    assert lab.case is case


def test_the_level_of_a_walk_is_that_of_its_second_half() -> None:
    assert Walk((9.0, 9.0, 2.0, 4.0), True).level == 3.0
    assert Walk((), True).level == math.inf


def test_in_a_warm_up_the_rate_is_tried_as_high_as_the_schedule_will_lead() -> None:
    rates = [1e-3 * (i + 1) / 40 for i in range(8)]
    lab = run(8, schedule=lambda step: (step + 1) / 40, losses=[3.0, 3.0] + [9.0] * 6, recent_rates=rates)
    lab.case = replace(lab.case, finding=replace(lab.case.finding, data={"before": 3.0}))
    course = Course.of(lab, lab.case)
    assert 5.0 < course.boost <= 40.0
    assert course.warmup(lab.case) == {}, "it is warming up by itself"


def test_at_a_steady_rate_nothing_is_added_but_a_short_warm_up() -> None:
    lab = run(32, losses=RISEN, recent_rates=[1e-3] * 32)
    course = Course.of(lab, lab.case)
    assert course.boost == 1.0
    assert course.warmup(lab.case) == {"warmup_from_update": 21, "warmup_steps": WALK_STEPS // 2}
