"""The true first step: where the failure that shows was made by an earlier update, the timeline tells by which.

Earlier states are looked at, at distances that double, until one is good; then the border is found by bisection. Each
state that is looked at is charged as one replay, and the search ends where the budget does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from finitune.core.incident import Suspect
from finitune.engine.case import Case
from finitune.engine.lab import Lab
from finitune.engine.op_numbers import extremes, watchable
from finitune.engine.snapshot import Snapshot

_COST = 1.0
ABSURD = 2.0**40
"""No weight and no gradient of a sound run comes near it (bit 30 of an fp32 number below 2 multiplies by 2^128)."""
MAX_LONE = 8
GAP = 2.0**20
"""All others of the tensor are smaller than the absurd ones by at least this factor."""
MAX_LOOKS = 10
"""Earlier states that one search looks at: enough for some 30 steps exactly, and for 500 roughly."""


@dataclass(frozen=True, slots=True)
class Since:
    """Since when something is so."""

    step: int
    """The first step known whose state has it so; 0: it was so before training."""
    exact: bool
    """The state before that step does not have it (or the step is 0). False: no state in between could be looked at."""
    sound_at: int | None = None
    """Batches used up in the newest state known that does not have it; None: there is none, or none was looked at."""


def since_when(lab: Lab, holds: Callable[[Snapshot], bool]) -> Since:
    """Since which step the state has what it has before the failing step. Never raises BudgetSpent.

    States right after a change from outside may be out of reach, as the steps from an earlier state on come out
    otherwise; those before it are not.
    """
    bad, good, distance = lab.before.step, -1, 1
    for _ in range(MAX_LOOKS):
        if bad == 0 or (bad - good == 1 and good >= 0):
            break
        probe = (good + bad) // 2 if good >= 0 else max(0, lab.before.step - distance)
        answer = _answer(lab, probe, holds)
        if answer is None and (good >= 0 or probe == 0):
            break
        distance *= 2
        if answer is not None:
            good, bad = (good, probe) if answer else (probe, bad)
    exact = bad == 0 or (good >= 0 and bad - good == 1)
    return Since(bad, exact=exact, sound_at=good if good >= 0 else None)


def _answer(lab: Lab, step: int, holds: Callable[[Snapshot], bool]) -> bool | None:
    """What the state after ``step`` batches says; None where it cannot be had or afforded."""
    if not lab.budget.left(_COST):
        return None
    lab.budget.charge(_COST)
    state = lab.state_at(step)
    return None if state is None else holds(state)


def bad_value(name: str, tensor: torch.Tensor) -> bool:
    """Whether a state tensor holds what it must not: NaN, inf, a negative second moment, or a few absurd values."""
    if not watchable(tensor):
        return False
    low, high = extremes(tensor)
    if not (math.isfinite(low) and math.isfinite(high)) or (is_second_moment(name) and low < 0):
        return True
    return max(-low, high) >= _absurd(name) and bool(_lone(name, tensor).any())


def bad_mask(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Which elements of a real tensor :func:`bad_value` is about; bool, in its shape."""
    mask = torch.isfinite(tensor).logical_not_()
    if is_second_moment(name):
        mask |= tensor < 0
    return mask | _lone(name, torch.where(mask, torch.zeros_like(tensor), tensor))


def _absurd(name: str) -> float:
    return ABSURD**2 if is_second_moment(name) else ABSURD


def _lone(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Elements beyond any sense in a tensor that is sound otherwise: a flipped bit, a stray write.

    A run whose weights grow without bound makes many large ones, of every size; those are not meant.
    """
    size = tensor.detach().abs()
    mask = size >= _absurd(name)
    if not 0 < int(mask.sum()) <= MAX_LONE or mask.all():
        return torch.zeros_like(mask)
    rest = float(size.masked_fill(mask, 0.0).amax())
    return mask if rest * GAP <= _absurd(name) else torch.zeros_like(mask)


def is_second_moment(name: str) -> bool:
    """Whether it is Adam's running mean of squares (``<parameter>|exp_avg_sq``)."""
    return name.endswith(("exp_avg_sq", "max_exp_avg_sq"))


def has_bad(name: str) -> Callable[[Snapshot], bool]:
    """Whether a snapshot has a bad value in this tensor; a moment that did not exist yet is good."""

    def holds(snapshot: Snapshot) -> bool:
        tensor = snapshot.tensors.get(name)
        return tensor is not None and bad_value(name, tensor)

    return holds


def first_bad_step(lab: Lab, case: Case) -> int | None:
    """The step (1-based) whose update made the earliest of the tensors that the failure comes from bad.

    0: they were bad before training. None: the failing step itself is the origin, or nothing earlier is to blame. Where
    the budget or the timeline ends first it is the earliest step known to have it.
    """
    known = [int(s.data["since_step"] or 0) for s in case.suspects if _is_dated(s.data)]
    names = [s.name for s in case.suspects if _was_bad_before(s, lab.before.tensors) and not _is_dated(s.data)]
    found = [*known, *(since_when(lab, has_bad(name)).step for name in names[:1])]
    return min(found) if found else None


def _is_dated(data: Mapping[str, object]) -> bool:
    """``since_step`` None with ``since_exact``: from the start."""
    return data.get("since_step") is not None or data.get("since_exact") is True


def _was_bad_before(suspect: Suspect, before: Mapping[str, torch.Tensor]) -> bool:
    tensor = before.get(suspect.name)
    return suspect.kind in ("parameter", "moment") and tensor is not None and bad_value(suspect.name, tensor)
