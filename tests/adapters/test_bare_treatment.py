"""What the guard remembers of incidents: what counts against a run, and what is given back."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import finitune
from finitune.core.incident import Cause, Diagnosis, Incident, Safety, Trigger
from finitune.core.types import Finding, Severity
from finitune.engine.conditions import AS_CONFIGURED, Conditions
from finitune.engine.plan import BatchFate, Plan


def incident(number: int, step: int, code: str) -> Incident:
    cause = Cause("some", code, "N", 0.9, True)
    finding = Finding("NUM011", Severity.WARNING)
    return Incident(number, step, step, Trigger.OUTLIER, finding, diagnosis=Diagnosis((cause,)))


@pytest.fixture
def guard() -> Iterator[finitune.BareGuard]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    made = finitune.guard(net, torch.optim.AdamW(net.parameters(), lr=1e-3), lambda m, x: m(x).square().mean())
    walk(made, 3)
    yield made
    made.close()


def walk(guard: finitune.BareGuard, steps: int) -> None:
    for _ in range(steps):
        guard.step(torch.randn(4, 4))


def plan(fate: BatchFate = BatchFate.RETRY, conditions: Conditions = AS_CONFIGURED, *, temporary: bool = False) -> Plan:
    return Plan("some", Safety.SAFE, conditions, fate=fate, temporary=temporary)


@pytest.mark.parametrize(("fate", "spent"), [(BatchFate.PASS, False), (BatchFate.RETRY, True)])
def test_what_is_harmless_may_come_any_number_of_times(guard, fate: BatchFate, spent: bool) -> None:
    treatment = guard.engine.treatment
    for number in range(1, 6):
        treatment.apply(incident(number, 3, "NUM406"), plan(fate))
    assert treatment.is_spent(incident(6, 4, "NUM406"), plan(fate), 3) is spent
    assert not treatment.is_spent(incident(6, 4, "NUM400"), plan(fate), 3), "another cause"


def test_giving_back_leaves_what_came_in_between_in_force(guard) -> None:
    treatment, port = guard.engine.treatment, guard.port
    treatment.apply(incident(1, 3, "NUM400"), plan(conditions=Conditions(fp32_modules=("0",)), temporary=True))
    treatment.apply(incident(2, 3, "DAT401"), plan(conditions=Conditions(fp32_modules=("0",), quarantine=("ab",))))
    walk(guard, treatment.probation_steps + 1)
    assert port.conditions == Conditions(quarantine=("ab",))
    assert "given" not in treatment.memory


def test_two_temporary_cures_are_given_back_together(guard) -> None:
    treatment, port = guard.engine.treatment, guard.port
    treatment.apply(incident(1, 3, "NUM400"), plan(conditions=Conditions(fp32_modules=("0",)), temporary=True))
    treatment.apply(incident(2, 3, "NUM400"), plan(conditions=Conditions(fp32_modules=("0", "2")), temporary=True))
    remembered = copy.deepcopy(treatment.memory)
    walk(guard, treatment.probation_steps + 1)
    assert remembered["incidents"] == treatment.memory["incidents"]
    assert port.conditions == AS_CONFIGURED
