"""From a diagnosis to plans: which remedies may be tried, and in which order. Pure; nothing is tried here."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from finitune.core import registry
from finitune.core.incident import Cause, Diagnosis, Safety, Trigger, Verdict
from finitune.engine.case import Case
from finitune.engine.conditions import Conditions
from finitune.engine.diagnose import remedies_of
from finitune.engine.plan import BatchFate, Plan

UNKNOWN = Cause("unknown", "unknown", "X", 0.0, False)
"""Stands for the cause that no experiment named."""
ALLOWED = {"observe": (), "safe": (Safety.SAFE,), "auto": (Safety.SAFE, Safety.LOSSY)}
"""What may be applied without being asked for, by policy."""

_PRECISIONS = (None, "bf16", "fp32")


def candidates(case: Case, diagnosis: Diagnosis, now: Conditions, policy: str) -> list[Plan]:
    """Plans that may be tried, in order: those of the named causes, of suspected ones, for an unknown cause the batch
    is given up, and the halt last. None under "observe".

    Where nothing has failed (a forecast, a silent fault), leaving the run as it is comes before the halt. No plan takes
    back what is in force already, and none comes twice. Raises ValueError for a policy that does not exist.
    """
    if policy not in ALLOWED:
        raise ValueError(f"policy {policy!r} is not one of {', '.join(ALLOWED)}")
    if policy == "observe":
        return []
    allowed = ALLOWED[policy]
    return [p for p in _every(case, diagnosis, now) if p.safety in allowed]


def asked(case: Case, diagnosis: Diagnosis, now: Conditions) -> list[Plan]:
    """Plans that need consent: they are told, never tried."""
    return [p for p in _every(case, diagnosis, now) if p.safety is Safety.ASK]


def _every(case: Case, diagnosis: Diagnosis, now: Conditions) -> Iterator[Plan]:
    """All plans in order, each once, without those that change nothing or loosen something."""
    seen: set[Any] = set()
    for plan in _proposed(case, diagnosis, now):
        key = (plan.conditions, plan.to_step, plan.mends, plan.fate, plan.halts)
        if key not in seen and not _is_idle(plan, case, now) and not loosens(plan.conditions, now):
            seen.add(key)
            yield plan


def _proposed(case: Case, diagnosis: Diagnosis, now: Conditions) -> Iterator[Plan]:
    for cause, remedy in remedies_of(diagnosis.causes):
        yield from _plans(remedy, case, cause, now)
    if not diagnosis.known:
        # Whether the batches to come are fine without this one is for the proof to say.
        yield from _plans("drop_batch", case, UNKNOWN, now)
    if case.trigger is Trigger.FORECAST or (case.trigger is Trigger.SILENT and not diagnosis.known):
        yield from _plans("let_pass", case, UNKNOWN, now)
    yield from _plans("halt", case, diagnosis.top or UNKNOWN, now)


def _plans(remedy: str, case: Case, cause: Cause, now: Conditions) -> Iterable[Plan]:
    """The plans of one remedy. One that cannot be loaded or fails (a third party's) is left out with a warning."""
    try:
        return list(registry.load("remedies", remedy).plans(case, cause, now))
    except Exception as error:  # noqa: BLE001 - code of third parties
        warnings.warn(f"the remedy {remedy} could not plan: {error!r}", RuntimeWarning, stacklevel=2)
        return ()


def _is_idle(plan: Plan, case: Case, now: Conditions) -> bool:
    """To compute the same again under the same conditions helps only where the failure does not repeat."""
    changes = plan.conditions != now or plan.mends or plan.to_step is not None or plan.halts
    return not changes and plan.fate is BatchFate.RETRY and case.verdict is not Verdict.NOT_REPRODUCED


def loosens(planned: Conditions, now: Conditions) -> bool:
    """Something in force would be given up: a smaller rate or norm, a wider format, rows in quarantine."""
    return (
        planned.lr_factor > now.lr_factor
        or _gives_up(now.max_lr, planned.max_lr, larger=True)
        or _gives_up(now.max_grad_norm, planned.max_grad_norm, larger=True)
        or _gives_up(now.adam_eps, planned.adam_eps, larger=False)
        or (now.clipper is not None and planned.clipper is None)
        or (now.attention is not None and planned.attention is None)
        or _rank(planned.precision) < _rank(now.precision)
        or not set(now.quarantine) <= set(planned.quarantine)
        or (planned.precision is None and not set(now.fp32_modules) <= set(planned.fp32_modules))
    )


def _gives_up(was: float | None, planned: float | None, *, larger: bool) -> bool:
    """A limit is taken away, or made ``larger`` (else smaller) than it was."""
    if was is None or planned is None:
        return was is not None
    return planned > was if larger else planned < was


def _rank(precision: str | None) -> int:
    return _PRECISIONS.index(precision) if precision in _PRECISIONS else 0
