"""Healthy runs of the bench: healthy by construction, and silent under the guard (a slice; the bench runs all)."""

from __future__ import annotations

import math

import pytest
import torch

from finitune.bench.cases import Case
from finitune.bench.harness import driven, final_loss, fresh, run_case, run_plain, same_bits
from finitune.bench.loops import Script
from finitune.bench.witness import Witness
from finitune.core import registry

NAMES = registry.names("controls")
KNOWN = {
    "accumulation",
    "curriculum",
    "dropout",
    "epochs",
    "fp16_startup",
    "half_easy",
    "half_weights",
    "hard_rows",
    "long_rows",
    "lora",
    "masked_rows",
    "moe_imbalance",
    "no_clipping",
    "one_row_steps",
    "plain_bf16",
    "plain_fp32",
    "policy_gradient",
    "preference",
    "pretrained",
    "rare_rows",
    "real_text",
    "recipe_packed_lora",
    "recipe_plain",
    "recipe_resumed",
    "restarts",
    "roll_outs",
    "sparse_rewards",
    "vision",
    "warm_up",
}
LIGHT = tuple(n for n in NAMES if not getattr(registry.load("controls", n), "HEAVY", False))
RECIPES = tuple(n for n in LIGHT if n.startswith("recipe_"))
LOOPS = tuple(n for n in LIGHT if n not in RECIPES)
POLICIES = ("policy_gradient", "roll_outs", "sparse_rewards")


def test_there_are_twenty_of_them_and_a_hundred_thousand_steps_in_five_seeds() -> None:
    assert set(NAMES) >= KNOWN
    assert len(LIGHT) >= 20
    total = sum(registry.load("controls", n).STEPS for n in LIGHT)
    assert 5 * total >= 100_000


@pytest.mark.parametrize("name", LOOPS)
def test_the_plain_loop_ends_well(name: str) -> None:
    case = Case("controls", name, 1, quick=True)
    workload = fresh(case)
    says = registry.load("controls", name).plant(workload, case.random())
    witness = Witness(workload)
    Script(workload, witness).run()
    assert says
    assert not witness.error
    assert not witness.poisoned
    assert math.isfinite(workload.held_out_loss())


@pytest.mark.parametrize("name", LIGHT)
def test_the_guard_is_silent_and_changes_no_bit(name: str) -> None:
    record = run_case(Case("controls", name, 0, quick=True))
    assert record["codes"] == []
    assert record["interventions"] == 0
    assert record["same_bits"]


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_no_worse_after_the_whole_run(name: str) -> None:
    """A control is healthy to its end: a run that collapses half way would make right alarms count as wrong ones.

    With rewards of 0 and 1 it learns next to nothing in 160 steps.
    """
    case = Case("controls", name, 0)
    workload = fresh(case)
    registry.load("controls", name).plant(workload, case.random())
    before = workload.held_out_loss()
    witness = Witness(workload)
    Script(workload, witness).run()
    assert len(witness.losses) == registry.load("controls", name).STEPS
    assert min(witness.losses.values()) < 0.0 < max(witness.losses.values())
    assert workload.held_out_loss() < before + (0.05 if name == "sparse_rewards" else 0.0)


def test_sparse_rewards_leave_steps_without_a_gradient_and_take_no_other_values() -> None:
    case = Case("controls", "sparse_rewards", 0, quick=True)
    workload = fresh(case)
    registry.load("controls", "sparse_rewards").plant(workload, case.random())
    witness = Witness(workload)
    Script(workload, witness).run()
    assert {float(r) for batch in workload.batches for r in batch["rewards"]} == {0.0, 1.0}
    alike = [step for step, loss in witness.losses.items() if loss == 0.0]
    assert 5 < len(alike) < 110


@pytest.mark.parametrize("name", ["recipe_plain", "recipe_packed_lora"])
def test_a_recipe_ends_well_without_a_guard(name: str) -> None:
    case = Case("controls", name, 1)
    workload = fresh(case)
    assert registry.load("controls", name).plant(workload, case.random())
    assert run_plain(workload) > 0.0
    assert workload.step == workload.steps == registry.load("controls", name).STEPS
    assert math.isfinite(final_loss(workload))


def test_the_resumed_recipe_is_stopped_and_the_one_beside_it_is_not() -> None:
    case = Case("controls", "recipe_resumed", 0)
    workload = fresh(case)
    says = registry.load("controls", "recipe_resumed").plant(workload, case.random())
    witness = driven(case, workload)
    assert workload.stop_after is not None
    assert f"stopped after step {workload.stop_after} " in says
    assert sorted(witness.losses) == list(range(1, workload.steps + 1))
    assert workload.run_dir.is_dir()


def test_bits_that_differ_are_seen() -> None:
    """-0.0 is another number than 0.0 to nobody; one unit in the last place is."""
    case = Case("controls", "plain_fp32", 0, quick=True)
    one, other = fresh(case), fresh(case)
    assert same_bits(one, other)
    weight = next(iter(dict(other.state_tensors()).values()))
    with torch.no_grad():
        weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(math.inf))
    assert not same_bits(one, other)


def test_a_run_that_was_never_opened_has_no_bits_to_be_the_same() -> None:
    case = Case("controls", "recipe_plain", 0)
    assert not same_bits(fresh(case), fresh(case))
