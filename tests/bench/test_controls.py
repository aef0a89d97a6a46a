"""Healthy runs of the bench: healthy by construction, and silent under the guard (a slice; the bench runs all)."""

from __future__ import annotations

import math

import pytest

from finitune.bench.cases import Case
from finitune.bench.harness import fresh, run_case
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
    "restarts",
    "vision",
    "warm_up",
}
LIGHT = tuple(n for n in NAMES if not getattr(registry.load("controls", n), "HEAVY", False))


def test_there_are_twenty_of_them_and_a_hundred_thousand_steps_in_five_seeds() -> None:
    assert set(NAMES) >= KNOWN
    assert len(LIGHT) >= 20
    total = sum(registry.load("controls", n).STEPS for n in LIGHT)
    assert 5 * total >= 100_000


@pytest.mark.parametrize("name", LIGHT)
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
