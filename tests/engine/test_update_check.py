"""The update is looked at rarely, and something is said only of what goes the wrong way in several updates in a row."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from finitune.core.types import Judgement, Reading, Verdict
from finitune.engine.direction import Direction
from finitune.engine.step import Outcome
from finitune.engine.update_check import EVERY_UPDATES, FIRST_UPDATES, IN_A_ROW, UpdateCheck, is_wrong


class Bent(torch.optim.AdamW):
    """Goes the other way in some of its updates."""

    made = 0

    def __init__(self, params: Any, when: Callable[[int], bool]) -> None:
        super().__init__(params, 1e-3)
        self.when = when

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        was = [(p, p.clone()) for g in self.param_groups for p in g["params"]]
        super().step(closure)
        self.made += 1
        for p, old in was:
            if self.when(self.made):
                p.copy_(2 * old - p)


def run(
    when: Callable[[int], bool], updates: int = 80, verdict: Verdict = Verdict.COMMIT
) -> tuple[list[int], list[int]]:
    """At which updates (from 1) something is looked at, and at which something is found."""
    torch.manual_seed(0)
    model = nn.Linear(32, 32)
    optimizer, state = Bent(model.parameters(), when), SimpleNamespace(updates=0)
    port = SimpleNamespace(optimizer=optimizer, state=state, parameters=lambda: list(model.named_parameters()))
    check = UpdateCheck(port)  # type: ignore[arg-type]
    looked, found = [], []
    for number in range(1, updates + 1):
        (model(torch.randn(4, 32)) - 1).square().mean().backward()
        with check.watching():
            if optimizer._optimizer_step_pre_hooks:
                looked.append(number)
            optimizer.step()
        optimizer.zero_grad()
        outcome = check.judged(Outcome(Reading(number, 1.0, 1.0), Judgement(verdict), ()))
        found += [number for f in outcome.judgement.findings if f.code == "OPT120"]
        state.updates += 1
    return looked, found


def test_a_healthy_run_is_looked_at_in_its_first_updates_and_rarely_after_them() -> None:
    looked, found = run(lambda _made: False)
    first = list(range(1, FIRST_UPDATES + 1))
    assert looked == [*first, *range(EVERY_UPDATES + 1, 81, EVERY_UPDATES)]
    assert found == []


@pytest.mark.parametrize(
    ("since", "seen"), [(2, 2), (10, EVERY_UPDATES + 1), (EVERY_UPDATES + 2, 2 * EVERY_UPDATES + 1)]
)
def test_what_goes_uphill_is_told_once_after_a_row_of_looks(since: int, seen: int) -> None:
    looked, found = run(lambda made: made >= since)
    assert found == [seen + IN_A_ROW - 1]
    assert set(range(seen, seen + IN_A_ROW)) <= set(looked)


def test_weights_that_are_moved_back_now_and_then_are_no_fault() -> None:
    """As by an average of fast and slow weights every fifth update, or every other one."""
    for period in (2, 3, 5):
        assert run(lambda made, period=period: made % period == 0)[1] == []


def test_a_transaction_that_was_not_committed_tells_nothing() -> None:
    assert run(lambda _made: True, verdict=Verdict.ABORT)[1] == []


@pytest.mark.parametrize(
    ("num", "num_wrong", "expected"),
    [(63, 63, False), (64, 64, True), (1000, 899, False), (1000, 900, True), (0, 0, False)],
)
def test_few_elements_and_a_mere_majority_tell_nothing(num: int, num_wrong: int, expected: bool) -> None:
    assert is_wrong(Direction("w", "weight", num, num_wrong)) is expected
