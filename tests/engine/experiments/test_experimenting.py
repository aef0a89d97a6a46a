"""The experiments as a whole: order, budget, and no trace whatever a member does."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch

from engine.experiments.zoo import infinite_derivative, overflow
from finitune.core import registry
from finitune.core.incident import Evidence, Result, Suspect
from finitune.engine import experimenting
from finitune.engine.conditions import Conditions, NotPossible
from finitune.engine.experimenting import experiment, in_order, perform
from finitune.engine.lab import BudgetSpent, Lab
from finitune.numerics.fingerprint import fingerprint


@pytest.fixture
def lab() -> Lab:
    return infinite_derivative()


@pytest.fixture(autouse=True)
def _no_memory_of_other_tests() -> Iterator[None]:
    yield
    experimenting._leave_traces.clear()


def member(run: Callable[[Lab, Any], Any], *, cost: float = 1.0) -> ModuleType:
    return cast("ModuleType", SimpleNamespace(ORDER=1, COST=cost, run=run, wanted=lambda _case: True, SAYS={}))


def digest(lab: Lab) -> str:
    return fingerprint(lab.port.state_tensors(), lab.port.state_record()).digest


def good(name: str = "third_party") -> tuple[Evidence, tuple[Suspect, ...]]:
    return Evidence(name, Result.GOOD), (Suspect("module", "head"),)


def _weight(lab: Lab) -> None:
    lab.port.parameters()[0][1].data.view(-1)[0] += 1e-3


def _record(lab: Lab) -> None:
    lab.port.state.attempt += 1


def _conditions(lab: Lab) -> None:
    lab.port.adopt(Conditions(lr_factor=0.5))


def _gradient(lab: Lab) -> None:
    lab.port.forward_backward()


def _mode(lab: Lab) -> None:
    lab.port.model.eval()


@pytest.mark.parametrize("harm", [_weight, _record, _conditions, _gradient, _mode])
@pytest.mark.parametrize("raises", [None, ValueError("oops"), NotPossible("no"), BudgetSpent()])
def test_a_trace_is_undone_not_believed_and_not_left_twice(
    lab: Lab, harm: Callable[[Lab], None], raises: Exception | None
) -> None:
    calls = []

    def run(lab: Lab, case: Any) -> Any:
        calls.append(1)
        harm(lab)
        if raises is not None:
            raise raises
        return good()

    before = digest(lab)
    for _ in range(2):
        found, suspects = perform(lab, lab.case, "third_party", member(run))
        assert (found.result, suspects) == (Result.NOT_RUN, ())
        assert "left a trace" in found.numbers["reason"]
    assert len(calls) == 1
    assert digest(lab) == before
    assert lab.port.conditions == lab.now
    assert all(p.grad is None for _, p in lab.port.parameters())
    assert lab.port.model.training


def test_global_generators_are_as_before(lab: Lab) -> None:
    def run(_lab: Lab, _case: Any) -> Any:
        torch.rand(3)
        random.random()
        return good()

    states = torch.get_rng_state(), random.getstate()
    found, _ = perform(lab, lab.case, "third_party", member(run))
    assert found.result is Result.GOOD
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (NotPossible("there is no bf16"), "there is no bf16"),
        (ValueError("a bug"), "ValueError: a bug"),
        (MemoryError(), "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory"),
    ],
)
def test_what_could_not_be_made_says_why(lab: Lab, error: Exception, words: str) -> None:
    def run(_lab: Lab, _case: Any) -> Any:
        raise error

    found, _ = perform(lab, lab.case, "third_party", member(run))
    assert found.result is Result.NOT_RUN
    assert words in found.numbers["reason"]


def test_an_interrupt_is_not_swallowed(lab: Lab) -> None:
    def run(_lab: Lab, _case: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        perform(lab, lab.case, "third_party", member(run))


def test_a_spent_budget_ends_it_and_the_last_evidence_says_so(lab: Lab) -> None:
    lab.budget.max_replays = 0.0
    told: list[Evidence] = []
    case = experiment(lab, lab.case, journal=told.append)
    last = list(case.evidence.values())[-1]
    assert told[-1] == last
    assert (last.result, last.numbers["reason"]) == (Result.NOT_RUN, experimenting.NO_REPLAY_LEFT)
    assert lab.budget.replays == 0


def test_a_budget_that_runs_out_inside_an_experiment_ends_it_too(lab: Lab) -> None:
    def run(lab: Lab, _case: Any) -> Any:
        while True:
            lab.shoot()

    before = digest(lab)
    found, _ = perform(lab, lab.case, "third_party", member(run))
    assert found.numbers["budget_spent"] is True
    assert digest(lab) == before


def test_what_would_leave_nothing_for_the_proof_is_passed_over_and_cheaper_ones_are_not(lab: Lab) -> None:
    lab.budget.max_replays = 10.0
    dear, _ = perform(lab, lab.case, "dear", member(lambda _lab, _case: good(), cost=9.0))
    cheap, _ = perform(lab, lab.case, "cheap", member(lambda _lab, _case: good(), cost=8.0))
    assert (dear.result, cheap.result) == (Result.NOT_RUN, Result.GOOD)
    assert not dear.numbers.get("budget_spent")


def test_the_lab_has_the_case_at_every_moment_and_the_state_is_as_before() -> None:
    lab = overflow(0.2)
    before = digest(lab)
    seen: list[int] = []
    case = experiment(lab, lab.case, journal=lambda _e: seen.append(len(lab.case.evidence)))
    assert lab.case is case
    assert seen == list(range(1, len(case.evidence) + 1))
    assert digest(lab) == before


def test_cheap_ones_come_first_and_a_broken_member_is_left_out_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = [m.ORDER for _, m in in_order()]
    assert orders == sorted(orders)
    real = registry.load

    def load(family: str, name: str) -> ModuleType:
        if name == "fp32":
            raise registry.BrokenMember("lacks run")
        return real(family, name)

    monkeypatch.setattr(registry, "load", load)
    with pytest.warns(RuntimeWarning, match="fp32"):
        assert "fp32" not in dict(in_order())


def test_a_member_that_cannot_judge_is_not_wanted(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.load("experiments", "known_good_batch"), "wanted", lambda case: case.nothing)
    with pytest.warns(RuntimeWarning, match="known_good_batch"):
        assert "known_good_batch" not in experiment(lab, lab.case).evidence


def test_what_somebody_before_has_left_is_undone_first_and_no_experiment_is_blamed(lab: Lab) -> None:
    before = digest(lab)
    _weight(lab)
    case = experiment(lab, lab.case)
    assert digest(lab) == before
    assert experimenting._leave_traces == {}
    assert case.good("known_good_batch")
