"""Group testing finds the rows that fail, one or several, and the token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from finitune.core.incident import Suspect
from finitune.core.types import Reading
from finitune.engine.conditions import NotPossible
from finitune.engine.lab import BudgetSpent, Lab, Shot
from finitune.engine.port import WHOLE, Ask
from finitune.engine.rows import find_rows, find_span
from support.replay_port import BarePort, lab_of, with_case
from support.tiny_ports import llama_port


def port_of(bad: Any, *, rows: int = 8, micros: int = 1) -> BarePort:
    """Row number ``n`` of the step holds ``n`` everywhere; ``bad(numbers)`` says whether the loss is NaN."""
    model = nn.Linear(1, 1)

    def loss_fn(of: nn.Module, batch: Any) -> torch.Tensor:
        loss: torch.Tensor = of(batch["x"][:, :1]).mean()
        numbers = set(batch["x"][:, 0].int().tolist())
        return loss * float("nan") if bad(numbers) else loss

    x = torch.arange(rows * micros).float()
    steps = [[{"x": x[m * rows : (m + 1) * rows, None].expand(rows, 5)} for m in range(micros)]]
    return BarePort(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, steps)


def lab(bad: Any, **kept: Any) -> Lab:
    budget = kept.pop("max_replays", 200.0)
    return lab_of(port_of(bad, **kept), max_replays=budget)


@settings(deadline=None, max_examples=25)
@given(st.sets(st.integers(0, 15), min_size=1, max_size=3), st.sampled_from([(16, 1), (8, 2), (4, 4)]))
def test_all_independent_culprits_are_found_wherever_they_are(culprits: set[int], shape: tuple[int, int]) -> None:
    one = lab(lambda numbers: bool(numbers & culprits), rows=shape[0], micros=shape[1])
    found = find_rows(one, one.case)
    assert set(found.units) == culprits
    assert found.isolated
    assert found.num_shots == one.budget.replays <= 8 * len(culprits) + 1


def test_a_single_culprit_costs_two_steps_a_halving_and_one_for_the_rest() -> None:
    one = lab(lambda numbers: 5 in numbers, rows=16)
    found = find_rows(one, one.case)
    assert (found.units, found.num_shots) == ((5,), 9)


def test_a_right_hint_costs_three_steps_and_a_wrong_one_is_no_harm() -> None:
    for hint, shots in ((5, 3), (2, 99)):
        one = lab(lambda numbers: 5 in numbers, rows=16)
        case = with_case(one, suspects=(Suspect("row", "x", {"micro": 0, "index": hint}),))
        found = find_rows(one, case)
        assert found.units == (5,)
        assert found.isolated
        assert found.num_shots <= shots


def test_a_hint_that_names_a_culprit_and_a_bystander_is_sorted_out() -> None:
    one = lab(lambda numbers: 5 in numbers, rows=8)
    case = with_case(one, suspects=tuple(Suspect("row", str(n), {"micro": 0, "index": n}) for n in (1, 5)))
    assert find_rows(one, case).units == (5,)


def test_rows_that_fail_only_together_are_a_combination() -> None:
    one = lab(lambda numbers: {1, 6} <= numbers)
    found = find_rows(one, one.case)
    assert found.units == ()
    assert found.combinations == (tuple(range(8)),)
    assert not found.isolated


def test_a_culprit_beside_a_combination_is_told_apart() -> None:
    one = lab(lambda numbers: 0 in numbers or {5, 6} <= numbers)
    found = find_rows(one, one.case)
    assert found.units == (0,)
    assert found.combinations == ((4, 5, 6, 7),)
    assert found.rest_good
    assert not found.isolated


def test_where_every_row_fails_a_small_batch_is_searched_whole_and_a_large_one_given_up_early() -> None:
    small = lab(lambda numbers: True, rows=4)
    found = find_rows(small, small.case)
    assert found.every
    assert found.rest_good is None
    large = lab(lambda numbers: True, rows=64)
    found = find_rows(large, large.case)
    assert found.too_many
    assert not found.isolated
    assert found.num_shots <= 14


def test_where_most_rows_fail_all_of_them_are_named() -> None:
    one = lab(lambda numbers: bool(numbers - {3}), rows=4)
    found = find_rows(one, one.case)
    assert found.units == (0, 1, 2)
    assert found.isolated


def test_a_batch_of_one_row_needs_no_step() -> None:
    one = lab(lambda numbers: True, rows=1)
    found = find_rows(one, one.case)
    assert (found.units, found.num_shots, found.rest_good) == ((0,), 0, None)


def test_the_budget_ends_the_search_with_what_is_known() -> None:
    one = lab(lambda numbers: bool(numbers & {0, 5}), rows=8, max_replays=6.0)
    found = find_rows(one, one.case)
    assert not found.complete
    assert found.num_shots == 6
    assert found.rest_good is None
    spent = lab(lambda numbers: True, max_replays=0.0)
    with pytest.raises(BudgetSpent):
        find_rows(spent, spent.case)


def test_the_span_ends_at_the_token_that_makes_the_row_fail() -> None:
    port = llama_port(rows=4, width=24)
    port.batches[0][0]["input_ids"][2, 17] = 5
    with torch.no_grad():
        port.model.model.embed_tokens.weight[5] = float("inf")
    one = lab_of(port)
    assert find_rows(one, one.case).units == (2,)
    assert find_span(one, one.case, 2) == (17, 18)
    assert one.budget.replays <= 5 + 6


def test_a_named_span_is_checked_and_believed_or_not() -> None:
    port = llama_port(rows=4, width=24)
    port.batches[0][0]["input_ids"][2, 14:18] = 5
    with torch.no_grad():
        port.model.model.embed_tokens.weight[5] = float("inf")
    for span, expected in (([14, 18], (14, 18)), ([3, 9], (14, 15))):
        one = lab_of(port)
        case = with_case(one, suspects=(Suspect("tokens", "x", {"micro": 0, "index": 2, "span": span}),))
        assert find_span(one, case, 2) == expected


def test_a_prefix_without_any_target_is_another_failure_and_moves_no_border(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over no token is 0 / 0 with gradients of zero: that is not how this row fails."""
    port = llama_port(rows=4, width=24)
    port.batches[0][0]["input_ids"][2, 17] = 5
    with torch.no_grad():
        port.model.model.embed_tokens.weight[5] = float("inf")
    one = lab_of(port)
    real = one.shoot

    def shoot(conditions: Any = None, ask: Ask = WHOLE) -> Shot:
        if ask.prefix_tokens is not None and ask.prefix_tokens < 10:
            return Shot(Reading(1, float("nan"), 0.0), True)
        return real(conditions, ask)

    monkeypatch.setattr(one, "shoot", shoot)
    assert find_span(one, one.case, 2) == (17, 18)


def test_without_prefixes_or_tokens_there_is_no_span() -> None:
    port = llama_port()
    port.causal = False
    one = lab_of(port)
    assert find_span(one, one.case, 0) is None
    floats = lab(lambda numbers: 5 in numbers)
    assert find_span(floats, floats.case, 5) is None


def test_a_port_without_units_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    one = lab(lambda numbers: True)
    monkeypatch.setattr(one.port, "units", lambda step=None: ())
    with pytest.raises(NotPossible):
        find_rows(one, one.case)


def lonely(numbers: list[int]) -> bool:
    """Fails where one of the rows 2 and 5 stands alone; copies of it are company."""
    return any(numbers.count(n) == 1 for n in (2, 5))


def port_of_groups(bad: Any, rows: int = 8) -> BarePort:
    model = nn.Linear(1, 1)

    def loss_fn(of: nn.Module, batch: Any) -> torch.Tensor:
        loss: torch.Tensor = of(batch["x"][:, :1]).mean()
        return loss * float("nan") if bad(batch["x"][:, 0].int().tolist()) else loss

    x = torch.arange(rows).float()[:, None].expand(rows, 5)
    return BarePort(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, [[{"x": x}]])


# Copies of the first rows hold the places of others: of these it stays open which of two it is.
@pytest.mark.parametrize("lone", range(3, 8))
def test_a_row_that_fails_for_being_alone_is_found_by_leaving_it_out(lone: int) -> None:
    one = lab_of(port_of_groups(lambda numbers: numbers.count(lone) == 1), max_replays=60.0)
    found = find_rows(one, one.case)
    assert (found.units, found.isolated) == ((lone,), True)
    assert found.num_shots <= 16


def test_rows_that_fail_for_being_alone_are_those_that_the_localisation_names() -> None:
    one = lab_of(port_of_groups(lonely), max_replays=60.0)
    hints = [Suspect("row", str(n), {"micro": 0, "index": n}) for n in (2, 5)]
    found = find_rows(one, with_case(one, suspects=tuple(hints)))
    assert (found.units, found.isolated) == ((2, 5), True)


def test_two_rows_that_fail_only_together_are_not_told_apart_by_leaving_one_out() -> None:
    one = lab_of(port_of_groups(lambda numbers: 1 in numbers and 6 in numbers), max_replays=60.0)
    found = find_rows(one, one.case)
    assert not found.isolated
    assert found.units == ()
