"""The rate that the run bore, from where it was raised: blamed where nothing else was different, and proved with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.experiments.port import HalfPort, causal_loss, llama, text
from engine.experiments.test_course import run
from engine.experiments.test_single import made, trained
from finitune.core import registry
from finitune.core.incident import Evidence, Result, Trigger
from finitune.engine.case import Case
from finitune.engine.conditions import NotPossible
from finitune.engine.diagnose import diagnose
from finitune.engine.experimenting import experiment
from finitune.engine.experiments import borne_rate
from finitune.engine.experiments._course import _updates_back
from finitune.engine.lab import Lab
from finitune.engine.prove import ProofSettings, prove
from finitune.engine.remedying import candidates

LR = 3e-3
JUMP = 24


def told(lab: Lab, schedule: Callable[[int], float]) -> Lab:
    """As the guard tells the rates of the updates so far."""
    rates = [LR * schedule(step) for step in range(lab.before.step)]
    past = {**lab.case.past, "recent_rates": rates, "updates": lab.before.step}
    lab.case = replace(lab.case, past=past)
    return lab


def jump(factor: float = 300.0, steps: int = 27, at: int = JUMP, **batches: Any) -> Lab:
    """AdamW whose rate is multiplied from a step on; the loss has run away."""

    def schedule(step: int) -> float:
        return 1.0 if step < at else factor

    model = llama()
    port = HalfPort(model, torch.optim.AdamW(model.parameters(), lr=LR), causal_loss, text(60), schedule=schedule)
    return told(trained(steps, Trigger.RUNAWAY, port=port), schedule)


def test_at_the_rate_of_before_the_run_goes_on_as_before() -> None:
    lab = jump()
    found, suspects = made(lab, "borne_rate")
    assert (found.result, suspects) == (Result.GOOD, ())
    numbers = found.numbers
    assert (numbers["start_step"], numbers["max_lr"], numbers["was"]) == (JUMP, LR, 300 * LR)
    assert max(numbers["losses"]) < 1.2 * numbers["median_loss"] < max(numbers["losses_same"])
    assert lab.budget.replays == len(numbers["losses"]) == 27 - JUMP + 1 + 2
    assert "{" not in borne_rate.SAYS[Result.GOOD].say(numbers)


def test_it_names_the_rate_and_is_itself_the_proof_of_the_cure() -> None:
    lab = jump()
    case = experiment(lab, lab.case)
    diagnosis = diagnose(case)
    assert (diagnosis.code, "lower_lr" in case.evidence) == ("OPT401", False)
    plan = candidates(case, diagnosis, lab.now, "auto")[0]
    assert (plan.remedy, plan.conditions.max_lr, plan.to_step) == ("lower_lr", LR, JUMP)
    spent = lab.budget.replays
    trial = prove(lab, plan, ProofSettings())
    assert (trial.holds, trial.replays) == (True, 0.0)
    assert trial.losses == tuple(case.evidence["borne_rate"].numbers["losses"])
    assert spent <= 10


def test_a_proof_of_another_length_or_rate_is_computed() -> None:
    lab = jump()
    case = experiment(lab, lab.case)
    first, half = candidates(case, diagnose(case), lab.now, "auto")[:2]
    assert half.conditions.max_lr == LR / 2
    assert prove(lab, half, ProofSettings()).replays == 6
    assert prove(lab, first, ProofSettings(past_steps=4)).replays == 8


def test_what_fails_at_the_rate_of_before_as_well_is_not_the_rates() -> None:
    """The rate is doubled where the data change, and it is the data."""
    lab = jump(factor=2.0, steps=27)
    for (batch,) in lab.port.batches[JUMP:]:  # type: ignore[attr-defined]
        batch["labels"] = batch["labels"].flip(1).contiguous()
    lab.case = replace(lab.case, past={**lab.case.past, "recent_losses": [2.0] * JUMP + [8.0] * 3})
    found, _ = made(lab, "borne_rate")
    assert found.result is Result.BAD
    assert "{" not in borne_rate.SAYS[Result.BAD].say(found.numbers)


def test_a_batch_that_was_given_up_since_is_stepped_over() -> None:
    """27 steps used up, one of them, the 26th, without an update: 3 updates ago is 4 steps ago."""
    made_ = {step: step - (step >= 26) for step in range(28)}
    states: Any = {step: SimpleNamespace(step=step, record={"updates": made_[step]}) for step in made_}
    lab: Any = SimpleNamespace(before=states[27], state_at=states.get)
    assert [_updates_back(lab, back).step for back in (1, 2, 3)] == [26, 24, 23]
    with pytest.raises(NotPossible, match="40 updates before"):
        _updates_back(lab, 40)


def raised(trigger: Trigger, good: str = "", bad: str = "", **facts: Any) -> Case:
    lab = run(30, recent_rates=[1e-3] * 28 + [1.0] * 2)
    found = {n: Evidence(n, r) for names, r in ((good, Result.GOOD), (bad, Result.BAD)) for n in names.split()}
    return replace(lab.case, trigger=trigger, evidence=found, facts={**lab.case.facts, **facts})


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (raised(Trigger.RUNAWAY), True),
        (raised(Trigger.UPDATE), True),
        (raised(Trigger.OUTLIER, "known_good_batch"), True),
        (raised(Trigger.LOSS, "", "known_good_batch"), True),
        (raised(Trigger.LOSS, "known_good_batch"), False),
        (raised(Trigger.LOSS, "fp32", "known_good_batch", precision="fp16"), False),
        (raised(Trigger.RUNAWAY, "", "scan_state"), False),
        (raised(Trigger.UPDATE, "adam_eps"), False),
        (raised(Trigger.FORECAST), False),
    ],
)
def test_it_is_wanted_where_a_raised_rate_may_be_the_reason(case: Case, expected: bool) -> None:
    assert borne_rate.wanted(case) is expected
    steady = replace(case, past={**case.past, "recent_rates": [1e-3] * 30})
    assert not borne_rate.wanted(steady)


def test_once_it_has_cured_no_other_course_is_walked() -> None:
    case = raised(Trigger.RUNAWAY, "borne_rate")
    assert not any(registry.load("experiments", name).wanted(case) for name in ("lower_lr", "tighter_clip"))
