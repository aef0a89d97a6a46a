"""Healthy runs: deterministic, learning, finite, with names for every row."""

from __future__ import annotations

import pytest
import torch

from finitune.bench.loops import Script
from finitune.bench.witness import Witness
from finitune.bench.workload import PRECISIONS, Workload
from finitune.core import registry

NAMES = registry.names("runs")
KNOWN = {
    "gloo_sft",
    "accumulated_sft",
    "dpo",
    "half_weights",
    "internlm2_sft",
    "llama_sft",
    "lora",
    "mixtral",
    "orpo",
    "policy_gradient",
    "pretrained_sft",
    "pretrained_sgd",
    "recipe_sft",
    "roll_outs",
    "smollm2_lora",
    "vl_stub",
}
CELLS = [(name, precision) for name in NAMES for precision in registry.load("runs", name).PRECISIONS]
LIGHT = [c for c in CELLS if not getattr(registry.load("runs", c[0]), "HEAVY", False)]
# Runs that the plain loop cannot drive are tested by themselves.
PLAIN = [c for c in LIGHT if not getattr(registry.load("runs", c[0]), "NEEDS", ())]


def test_the_runs() -> None:
    assert set(NAMES) >= KNOWN


def build(name: str, precision: str, steps: int) -> Workload:
    torch.manual_seed(0)
    workload: Workload = registry.load("runs", name).build(3, precision, steps)
    torch.manual_seed(0)
    return workload


@pytest.mark.parametrize("name", NAMES)
def test_a_run_says_its_precisions(name: str) -> None:
    given = registry.load("runs", name).PRECISIONS
    assert given
    assert set(given) <= set(PRECISIONS)


@pytest.mark.parametrize(("name", "precision"), PLAIN)
def test_a_run_is_the_same_twice_and_every_row_has_a_name(name: str, precision: str) -> None:
    one, other = build(name, precision, 4), build(name, precision, 4)
    for workload in (one, other):
        Script(workload, Witness(workload)).run()
    pairs = zip(one.state_tensors(), other.state_tensors(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)
    assert one.rows == other.rows
    assert len(one.rows) == len(one.batches) == 4
    for step in range(1, 5):
        assert sum(len(next(iter(m.values()))) for m in one.micros(step)) == len(one.rows[step - 1])


@pytest.mark.parametrize("name", sorted({name for name, _ in PLAIN}))
def test_a_run_learns_and_stays_finite(name: str) -> None:
    module = registry.load("runs", name)
    workload = build(name, module.PRECISIONS[0], module.STEPS)
    before = workload.held_out_loss()
    witness = Witness(workload)
    Script(workload, witness).run()
    assert not witness.error
    assert not witness.poisoned
    assert workload.held_out_loss() < before
