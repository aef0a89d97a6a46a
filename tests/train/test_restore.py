"""The state of a checkpoint in a prepared run: its place in the data, its rate, the format of its moments."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finitune.data.loader import Cursor
from finitune.train import restore as subject
from finitune.train.recipe import Recipe
from finitune.train.restore import rate_under
from support.runs import ready

pytestmark = pytest.mark.usefixtures("quick_plan")


def at(epoch: int, step: int, batches: int) -> SimpleNamespace:
    """A run whose every epoch has so many batches."""
    loader = SimpleNamespace(steps_per_epoch=lambda _epoch: batches)
    parts, state = SimpleNamespace(loader=loader), SimpleNamespace(cursor=Cursor(epoch, step))
    return SimpleNamespace(port=SimpleNamespace(parts=parts, state=state))


@given(st.integers(1, 1000), st.integers(1, 1000), st.data())
def test_a_place_in_the_data_stays_at_its_share_of_the_epoch(was, now, data):
    step = data.draw(st.integers(0, was - 1))
    cursor = subject._moved(at(3, step, now), {"data": {"steps_per_epoch": was}})
    assert cursor.epoch == 3
    assert 0 <= cursor.step < now
    assert abs(cursor.step / now - step / was) <= 1 / now
    assert was != now or cursor.step == step


@pytest.mark.parametrize(
    "before", [{}, {"data": 3}, {"data": {"steps_per_epoch": 0}}, {"data": {"steps_per_epoch": "x"}}]
)
def test_a_place_behind_the_end_of_an_epoch_is_the_start_of_the_next(before):
    assert subject._moved(at(1, 7, 5), before) == Cursor(2, 0)
    assert subject._moved(at(1, 4, 5), before) == Cursor(1, 4)


@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        ("constant", (1.0, 1.0, 1.0)),
        ("linear", (0.25, 1.0, 0.0)),
        ("cosine", (0.25, 1.0, 0.0)),
        ("constant_with_warmup", (0.25, 1.0, 1.0)),
        ("warmup_stable_decay", (0.25, 1.0, 0.0)),
    ],
)
def test_the_rate_of_a_stored_recipe(kind, rates):
    recipe = Recipe(learning_rate=1e-3, lr_scheduler_type=kind, warmup_steps=3).model_dump(mode="json")
    assert [rate_under(recipe, 100, k) for k in (0, 3, 100)] == pytest.approx([1e-3 * r for r in rates], abs=1e-12)


@pytest.mark.parametrize("recipe", [None, 3, {"learning_rate": "?"}, {"no": 1}, {"fp16": True, "bf16": True}])
def test_what_is_no_recipe_has_no_rate(recipe):
    assert rate_under(recipe, 10, 3) is None


def test_the_rate_is_that_of_the_run_itself(tmp_path):
    prepared = ready(tmp_path, "max_steps=20")
    for prepared.port.state.updates in range(20):
        now = rate_under(prepared.recipe.model_dump(mode="json"), 20, prepared.port.state.updates)
        assert now == prepared.port.lr


def test_moments_take_the_format_of_their_weights(tmp_path):
    prepared = ready(tmp_path)
    parts = prepared.port.parts
    _, parameter = parts.parameters[0]
    moments = torch.zeros_like(parameter, dtype=torch.bfloat16)
    parts.optimizer.state[parameter] = {"exp_avg": moments, "exp_avg_sq": moments.clone(), "step": torch.tensor(3.0)}
    assert list(subject._moment_faults(prepared)) == []
    subject._in_the_weights_format(prepared)
    slots = parts.optimizer.state[parameter]
    assert (slots["exp_avg"].dtype, slots["exp_avg_sq"].dtype, slots["step"].item()) == (
        torch.float32,
        torch.float32,
        3,
    )
    del slots["step"]
    assert len(list(subject._moment_faults(prepared))) == 1
