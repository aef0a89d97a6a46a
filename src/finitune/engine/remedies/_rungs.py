"""What several remedies read from a case: earlier incidents of its cause, numbers of evidence, states to return to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from finitune.core.incident import Cause, Safety, Suspect, Trigger
from finitune.engine.case import Case
from finitune.engine.conditions import Conditions
from finitune.engine.plan import Plan

_FINE_PRECISIONS = ("fp32",)


def number(value: Any) -> float | None:
    """``value`` as a finite float, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def step(value: Any) -> int | None:
    """``value`` as a number of batches used up, None for anything else."""
    found = number(value)
    return int(found) if found is not None and found >= 0 else None


def steps(values: Any) -> tuple[int, ...]:
    """The step numbers in a list, newest first, each once."""
    found = {s for v in values if (s := step(v)) is not None} if isinstance(values, list | tuple) else set()
    return tuple(sorted(found, reverse=True))


def names(values: Any) -> tuple[str, ...]:
    """The names in a list, each once."""
    return tuple(dict.fromkeys(v for v in values if isinstance(v, str))) if isinstance(values, list | tuple) else ()


def relapses(case: Case, cause: Cause, *remedies: str) -> int:
    """How often this cause was treated by these remedies before, in this run."""
    return sum(i.get("remedy") in remedies for i in _earlier(case, cause))


def relapses_at(case: Case, cause: Cause, *remedies: str) -> int:
    """How often of these it was at the very same place."""
    return sum(i.get("remedy") in remedies and i.get("where") == cause.where for i in _earlier(case, cause))


def _earlier(case: Case, cause: Cause) -> list[dict[str, Any]]:
    past = case.past.get("incidents", ())
    told = [i for i in past if isinstance(i, dict)] if isinstance(past, list | tuple) else []
    return [i for i in told if i.get("code") == cause.code]


def newest_step(case: Case) -> int:
    """Batches used up before the failing step."""
    return max(0, case.reading.step - 1)


def first_skipped(case: Case) -> int | None:
    """Batches used up before those that were given up while a scale was sought; None: none were, or no way leads back.

    Giving them up has changed no weight: the cure may begin with the first of them.
    """
    return step(case.number("loss_scales", "back_to"))


def before_it_went_bad(case: Case) -> int | None:
    """The newest state in which no tensor was bad yet; None where all are good, or that state is not known."""
    if not case.bad("scan_state"):
        return None
    bad = [
        s for s in case.suspects_of("parameter", "moment", "buffer") if s.data.get("what") not in ("gradient", "update")
    ]
    good = [n for s in bad if (n := good_step(s)) is not None]
    fixed = any(s.data.get("frozen") is True or s.kind == "buffer" for s in bad)
    return min(good) if good and not fixed else None


def good_step(suspect: Suspect) -> int | None:
    """The newest state that has a tensor sound; None where it was bad from the start, or that is not known."""
    if suspect.data.get("since_exact") is False and (sound := step(suspect.data.get("sound_at"))) is not None:
        return sound
    since = step(suspect.data.get("since_step"))
    return since - 1 if since else None


def computes_in(case: Case, now: Conditions) -> str:
    """The precision in force: "fp32", "fp16", "bf16", ...; "" where it is not known."""
    return now.precision or str(case.facts.get("precision", ""))


def is_half(case: Case, now: Conditions) -> bool:
    """Something is left that could be computed in more than it is."""
    half = any(w in ("float16", "bfloat16") for w in names(case.facts.get("weights", ())))
    return computes_in(case, now) not in _FINE_PRECISIONS or (now.precision is None and half)


def is_impossible(case: Case, experiment: str) -> bool:
    """The condition was tried and stays bad, or cannot be brought about here."""
    return experiment in case.evidence and not case.good(experiment)


def is_about_range(case: Case) -> bool:
    """The failure is one of this step's numbers, which may be over later; not one of the update or of the weights."""
    return case.trigger not in (Trigger.UPDATE, Trigger.SILENT) and not case.has_half_weights


def change(
    remedy: str, safety: Safety, now: Conditions, changes: dict[str, Any], *, to_step: int | None = None, **more: Any
) -> Plan:
    """A plan that changes conditions; ``more``: ``temporary``, and numbers for the words."""
    temporary = bool(more.pop("temporary", False))
    return Plan(remedy, safety, replace(now, **changes), to_step, temporary=temporary, data=more)


def listed(values: Iterable[str], most: int = 4) -> str:
    """Names for the reader, at most so many of them."""
    every = list(values)
    return (", ".join(every[:most]) + (f", ... ({len(every)})" if len(every) > most else "")) or "-"
