"""Real failures, from replay to proof: what the experiments really give leads to the right cause and cure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from engine.experiments.zoo import RECIPES, exploding_gradient, half_optimizer
from finitune.core.incident import Diagnosis
from finitune.engine.case import Case
from finitune.engine.diagnose import diagnose
from finitune.engine.experimenting import experiment
from finitune.engine.lab import Lab
from finitune.engine.localise import localise
from finitune.engine.plan import Plan
from finitune.engine.prove import ProofSettings, prove
from finitune.engine.remedying import candidates
from finitune.engine.replay import same_again


def examined(make: Callable[[], Lab]) -> tuple[Lab, Case, Diagnosis]:
    lab = make()
    case = lab.case = same_again(lab, replace(lab.case, evidence={}, suspects=()))
    case = lab.case = case.with_suspects(*localise(lab, case))
    case = experiment(lab, case)
    return lab, case, diagnose(case)


def cure(lab: Lab, case: Case, found: Diagnosis) -> Plan:
    """The first plan that holds."""
    plans = candidates(case, found, lab.now, "auto")
    return next(p for p in plans if p.halts or prove(lab, p, ProofSettings(2)).holds)


@pytest.mark.parametrize(
    ("recipe", "cause", "where", "remedy"),
    [
        ("A", "forward_overflow", "down_proj", "fp32_modules"),
        ("B", "learning_rate", "", "lower_lr"),
        ("C2", "nothing_supervised", "", "drop_batch"),
        ("D2", "loss_math", "Sqrt", ("skip_rows", "drop_batch")),
    ],
)
def test_a_recipe_leads_to_its_cause_and_cure(recipe: str, cause: str, where: str, remedy: str) -> None:
    lab, case, found = examined(RECIPES[recipe])
    assert found.top is not None
    assert (found.top.name, found.top.named) == (cause, True)
    assert where in found.top.where
    assert cure(lab, case, found).remedy in remedy


def test_a_bad_weight_of_the_start_is_told_and_nothing_is_made_of_it() -> None:
    _, _, found = examined(RECIPES["C"])
    assert [c.name for c in found.causes if c.named] == ["bad_weights"]
    assert found.causes[0].where == "model.embed_tokens.weight"


def test_an_exploding_gradient_is_clipped_at_the_same_rate() -> None:
    lab, case, found = examined(exploding_gradient)
    assert [c.name for c in found.causes if c.named] == ["exploding_gradient"]
    plan = cure(lab, case, found)
    assert (plan.remedy, plan.conditions.lr_factor) == ("clip", 1.0)


@pytest.mark.parametrize("caught", [True, False])
def test_an_optimizer_in_half_is_found_at_the_update_and_suspected_a_step_later(caught: bool) -> None:
    lab, case, found = examined(lambda: half_optimizer(caught=caught))
    assert found.top is not None
    assert (found.top.name, found.top.named) == ("half_optimizer", caught)
    assert not {"learning_rate", "bad_weights"} & {c.name for c in found.causes}
    plan = cure(lab, case, found)
    assert (plan.remedy, plan.conditions.adam_eps, plan.to_step) == ("adam_eps", 1e-4, None if caught else 0)
