"""The step that made a tensor bad is found in the timeline."""

from __future__ import annotations

import pytest
import torch

from finitune.core.incident import Suspect
from finitune.engine.first_step import Since, bad_value, first_bad_step, has_bad, since_when
from finitune.engine.snapshot import Snapshot
from support.replay_port import BarePort, lab_of, train, with_case
from support.tiny_ports import llama_port

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def history() -> tuple[BarePort, dict[int, Snapshot]]:
    port = llama_port(steps=13)
    states: dict[int, Snapshot] = {}
    train(port, 12, states)
    return port, states


def spoilt(history: tuple[BarePort, dict[int, Snapshot]], name: str, since: int, value: float) -> dict[int, Snapshot]:
    """The same states; from ``since`` on one element of the tensor is bad."""
    states = {}
    for step, state in history[1].items():
        tensors = dict(state.tensors)
        if step >= since and name in tensors:
            tensors[name] = tensors[name].clone()
            tensors[name].view(-1)[3] = value
        states[step] = Snapshot(tensors, state.record, state.mark, state.home)
    return states


@pytest.mark.parametrize("since", range(13))
def test_any_step_is_found_exactly_and_with_few_looks(
    history: tuple[BarePort, dict[int, Snapshot]], since: int
) -> None:
    states = spoilt(history, NAME, since, float("nan"))
    lab = lab_of(history[0], states=states)
    lab.before = states[12]
    assert since_when(lab, has_bad(NAME)) == Since(since, exact=True, sound_at=since - 1 if since else None)
    assert lab.budget.replays <= 8


def test_where_states_are_missing_the_earliest_known_one_is_given_as_inexact(
    history: tuple[BarePort, dict[int, Snapshot]],
) -> None:
    states = {s: v for s, v in spoilt(history, NAME, 2, float("inf")).items() if s >= 8}
    lab = lab_of(history[0], states=states)
    lab.before = states[12]
    assert since_when(lab, has_bad(NAME)) == Since(8, exact=False)


def test_the_budget_ends_the_search(history: tuple[BarePort, dict[int, Snapshot]]) -> None:
    states = spoilt(history, NAME, 2, float("inf"))
    lab = lab_of(history[0], states=states, max_replays=2.0)
    lab.before = states[12]
    assert since_when(lab, has_bad(NAME)) == Since(10, exact=False)
    assert lab.budget.replays == 2.0


def test_the_first_step_follows_from_the_suspects(history: tuple[BarePort, dict[int, Snapshot]]) -> None:
    states = spoilt(history, NAME, 7, float("inf"))
    lab = lab_of(history[0], states=states)
    lab.before = states[12]
    assert first_bad_step(lab, lab.case) is None
    case = with_case(lab, suspects=(Suspect("parameter", NAME, {"what": "weight"}),))
    assert first_bad_step(lab, case) == 7
    dated = with_case(lab, suspects=(Suspect("moment", f"{NAME}|exp_avg", {"since_step": 4}), *case.suspects))
    assert first_bad_step(lab, dated) == 4
    healthy = with_case(lab, suspects=(Suspect("parameter", "lm_head.weight", {"what": "gradient"}),))
    assert first_bad_step(lab, healthy) is None


@pytest.mark.parametrize(
    ("name", "value", "bad"),
    [
        ("w", float("nan"), True),
        ("w", float("-inf"), True),
        ("w", -1.0, False),
        ("w|exp_avg_sq", -1.0, True),
        ("w|exp_avg_sq", -0.0, False),
        ("w|exp_avg_sq", 1e-45, False),
        ("w|max_exp_avg_sq", -1e-45, True),
        ("w|exp_avg", -1.0, False),
    ],
)
def test_what_a_state_tensor_must_not_hold(name: str, value: float, bad: bool) -> None:
    assert bad_value(name, torch.tensor([1.0, value])) is bad
