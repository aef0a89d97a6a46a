"""One case from beginning to end: build the run, plant the fault, let the contender train, compare.

run -> Workload -> fault.plant -> Expected          the same drawn numbers for every contender
                -> contender.drive -> Witness
Workload of the reference -> plain loop -> clean loss
Expected + Witness + clean loss -> marks            one JSON-able record
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from finitune.bench.cases import Case
from finitune.bench.loops import Script
from finitune.bench.marks import control_marks, fault_marks
from finitune.bench.overhead import measure
from finitune.bench.recipe_load import RecipeLoad
from finitune.bench.witness import Witness
from finitune.bench.workload import Expected
from finitune.core.registry import load

QUICK_STEPS = 120
Load = Any
"""A Workload or a RecipeLoad: both have key, step, after, spoilt, state_tensors() and held_out_loss()."""


def run_case(case: Case) -> dict[str, Any]:
    """The record of one case. Raises nothing that a fault or a contender does; a defect of the bench is raised."""
    if case.kind == "overhead":
        return {**_named(case), **measure(case.name, case.seed)}
    contender = load("contenders", case.contender)
    run, precision = case.where()
    base = {**_named(case), "run": run, "precision": precision}
    reason = contender.missing() or _does_not_fit(contender, run)
    if reason is not None:
        return {**base, "skipped": reason}
    if case.kind == "controls":
        return {**base, **_control(case)}
    return {**base, **_fault(case)}


def _named(case: Case) -> dict[str, Any]:
    member = load(case.kind, case.name) if case.kind != "overhead" else None
    return {
        "key": case.key,
        "kind": case.kind,
        "name": case.name,
        "seed": case.seed,
        "contender": case.contender,
        "fault_class": getattr(member, "FAULT_CLASS", ""),
    }


def _does_not_fit(contender: Any, run: str) -> str | None:
    """Why a contender cannot drive a run; runs say what they need beyond a plain loop."""
    needs = frozenset(getattr(load("runs", run), "NEEDS", ()))
    lacking = needs - frozenset(getattr(contender, "ABLE", ()))
    return f"cannot drive {run}: {', '.join(sorted(lacking))}" if lacking else None


def _fault(case: Case) -> dict[str, Any]:
    workload, expected = planted(case)
    witness = driven(case, workload)
    reference = expected.reference
    clean = clean_loss(case) if reference else math.nan
    return fault_marks(expected, witness, final=final_loss(workload), clean=clean)


def _control(case: Case) -> dict[str, Any]:
    """A healthy run under the guard beside the same one without; what it begins with may be files and settings.

    Raises RuntimeError where the witness did not see the whole run: silence would prove nothing.
    """
    member = load("controls", case.name)
    guarded = fresh(case)
    says = member.plant(guarded, case.random())
    witness = driven(case, guarded)
    plain = fresh(case)
    member.plant(plain, case.random())
    torch.manual_seed(case.seed)
    with quiet():
        plain_s = run_plain(plain)
    steps = guarded.steps if isinstance(guarded, RecipeLoad) else len(guarded.batches)
    seen = {*witness.losses, *witness.refused}
    if not witness.error and len(seen) < steps:
        raise RuntimeError(f"{case.key}: {len(seen)} of {steps} steps were seen")
    return control_marks(says, witness, steps=steps, same_bits=same_bits(guarded, plain), plain_s=plain_s)


def same_bits(one: Load, other: Load) -> bool:
    """Whether weights, buffers and moments of two runs have the same names and bits; there must be some."""
    these, those = list(one.state_tensors()), list(other.state_tensors())
    if not these or [name for name, _ in these] != [name for name, _ in those]:
        return False
    return all(torch.equal(a, b) for (_, a), (_, b) in zip(these, those, strict=True))


def fresh(case: Case, precision: str | None = None) -> Load:
    """The healthy run of a case."""
    run, usual = case.where()
    member, own = load("runs", run), load(case.kind, case.name)
    torch.manual_seed(case.seed)
    steps = getattr(own, "STEPS", None) or member.STEPS
    if case.quick and case.kind == "controls":
        steps = min(steps, QUICK_STEPS)
    workload: Load = member.build(case.seed, precision or usual, steps)
    workload.key = case.key
    torch.manual_seed(case.seed)
    return workload


def planted(case: Case, precision: str | None = None) -> tuple[Load, Expected]:
    """The run with the fault in it, and the right answers."""
    workload = fresh(case, precision)
    expected: Expected = load("faults", case.name).plant(workload, case.random())
    return workload, expected


def driven(case: Case, workload: Load) -> Witness:
    """What the contender made of it."""
    witness = Witness(workload)
    torch.manual_seed(case.seed)
    with quiet():
        load("contenders", case.contender).drive(workload, witness)
    return witness


def clean_loss(case: Case) -> float:
    """Held-out loss of the reference: the plain loop without the fault, or with it in fp32."""
    return _clean_loss(case.kind, case.name, case.seed)


@lru_cache(maxsize=512)
def _clean_loss(kind: str, name: str, seed: int) -> float:
    case = Case(kind, name, seed)
    workload, expected = planted(case)
    workload = planted(case, "fp32")[0] if expected.reference == "fp32" else fresh(case)
    with quiet():
        run_plain(workload)
    return final_loss(workload)


def run_plain(workload: Load) -> float:
    """Train without a guard: the plain loop, or the trainer with its guard off. Seconds that its steps took."""
    if isinstance(workload, RecipeLoad):
        return workload.run_plain()
    witness = Witness(workload)
    Script(workload, witness).run()
    return witness.time_s


def final_loss(workload: Load) -> float:
    """The held-out loss; NaN where it cannot be computed any more."""
    try:
        with quiet():
            return float(workload.held_out_loss())
    except (RuntimeError, ValueError, IndexError):
        return math.nan


@contextmanager
def quiet() -> Iterator[None]:
    """Contenders warn a lot, of what was planted; the record holds what they say."""
    log = logging.getLogger("finitune")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        # Standard output belongs to the answer of the command, which may be one JSON object.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
