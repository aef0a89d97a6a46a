"""Redone state: the last steps before the failure once more, unchanged, and the state they lead to.

What it changes:
    Nothing. An earlier state is taken from the timeline, the steps since are computed again from it, and what comes out
    is compared, bit by bit, with the state that the failing step found.

What each outcome says:
    GOOD: another state comes out, and on it the failure is gone. The steps are deterministic, so something wrote into
    the state from outside: a flipped bit, a stray write. The tensors, the places, the old and the new values are told.
    BAD: the same state comes out (the run made it, for better or worse), or the failure stays on the other one.

What it costs:
    One replay for each step that is walked, one for the failing step, and what it takes to bring the state back.

Source:
    Dixit et al. 2021, "Silent Data Corruptions at Scale": found by computing again and comparing
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from finitune.core.incident import Result, Suspect, Trigger, Words
from finitune.core.types import Reading
from finitune.engine.case import Case
from finitune.engine.conditions import NotPossible
from finitune.engine.experiments._course import calm_level, limit_of, num_risen, ran_away
from finitune.engine.experiments._tools import Findings, evidence, fails_in_step, finite, precision_explains
from finitune.engine.lab import Lab
from finitune.engine.monitor import read
from finitune.engine.policy import Action, is_scale_overflow
from finitune.engine.snapshot import Snapshot
from finitune.numerics.seeds import generators_kept

ORDER = 54
COST = 4.0
SAYS = {
    Result.GOOD: Words(
        "The steps since {start_step}, computed again, lead to another state ({first} is {was} there, not {value}), "
        "and on it the failure is gone.",
        "从第 {start_step} 步起重新计算，得到不同的状态（{first} 在那里是 {was}，不是 {value}），在其上故障消失。",
    ),
    Result.BAD: Words(
        "The steps since {start_step}, computed again, lead to the failure as well ({num_tensors} tensors differ).",
        "从第 {start_step} 步起重新计算，仍然出现该故障（{num_tensors} 个张量不同）。",
    ),
}
_BACK = 3
"""A moment that was changed spoils its weight in the next update, and the step after that fails."""
_MAX_BACK = 16
_MAX_NAMED = 4
_LEAP_SHARE = 0.5


def wanted(case: Case) -> bool:
    """Batches that went well a moment ago fail now, or the loss rose in one leap, and nothing explains it yet."""
    if case.bad("scan_state") or precision_explains(case):
        return False
    if case.trigger is Trigger.RUNAWAY:
        return leapt(case)
    spoilt = fails_in_step(case) and case.bad("known_good_batch") and not case.number("known_good_batch", "num_good")
    return spoilt and (not ran_away(case) or leapt(case))


def leapt(case: Case) -> bool:
    """At least half of the rise (of the logarithm of the loss) was made in one step; a rate takes several."""
    losses = finite(case.past.get("recent_losses", ()))
    risen, calm = num_risen(losses), calm_level(losses)
    if calm is None or not risen or min(losses) <= 0:
        return False
    leap = max((math.log(b / a) for a, b in pairwise(losses[-risen - 1 :])), default=math.inf)
    return leap >= _LEAP_SHARE * math.log(max(losses[-risen:]) / calm)


def run(lab: Lab, case: Case) -> Findings:
    """Walk, compare, try. Raises NotPossible where the steps cannot be walked again, BudgetSpent."""
    start = _start(lab, case)
    with generators_kept(), lab.standing_at(start):
        parted, last = _walk(lab, start)
        now = {name: t for name, t in lab.port.state_tensors() if t.is_floating_point()}
        changes = _changes(lab.before.tensors, now)
        good = bool(changes) and not parted and not _fails(lab, case, last)
    top = changes[0] if changes else None
    numbers = {
        "start_step": start.step,
        "num_steps": lab.before.step - start.step,
        "num_tensors": len(changes),
        "first": top.name if top else None,
        "index": list(top.index) if top else None,
        "value": top.value if top else None,
        "was": top.was if top else None,
    }
    return evidence("redone_state", good, **numbers), tuple(c.suspect() for c in changes[:_MAX_NAMED]) if good else ()


def _start(lab: Lab, case: Case) -> Snapshot:
    """A state from before the change: one that the timeline reaches, with nothing but updates between it and now."""
    risen = num_risen(finite(case.past.get("recent_losses", ()))) if case.trigger is Trigger.RUNAWAY else 0
    back = min(max(_BACK, risen + _BACK - 1), lab.before.step)
    while 0 < back <= _MAX_BACK:
        lab.budget.charge(1.0)
        snapshot = lab.state_at(lab.before.step - back)
        if snapshot is not None:
            _check(snapshot.record, lab.before.record)
            return snapshot
        # The redo came to other numbers than the run: the change lies further back.
        back = min(2 * back, lab.before.step) if back < lab.before.step else 0
    raise NotPossible("no state of before can be had to compute the steps again from")


def _check(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise NotPossible where more than updates lies between two states: skipped batches, treatments."""
    same = all(then.get(key) == now.get(key) for key in ("conditions", "guard"))
    made = int(now.get("updates", -1)) - int(then.get("updates", 0))
    if not same or made != now["step"] - then["step"]:
        raise NotPossible("batches were skipped or conditions changed since")


def _walk(lab: Lab, start: Snapshot) -> tuple[bool, Reading | None]:
    """Compute the steps since ``start`` again; whether one of them fails, and the reading of the last."""
    reading = None
    for _ in range(lab.before.step - start.step):
        reading = _at_a_scale_that_fits(lab)
        if not (math.isfinite(reading.loss) and math.isfinite(reading.grad_norm)):
            lab.port.abort()
            return True, reading
        lab.port.commit(reading)
        lab.port.settle(Action.PROCEED, reading, clean=True)
    return False, reading


def _at_a_scale_that_fits(lab: Lab) -> Reading:
    while True:
        lab.budget.charge(1.0)
        reading = read(lab.port.forward_backward())
        if not (is_scale_overflow(reading) and lab.port.scale_left):
            return reading
        lab.port.abort()
        lab.port.settle(Action.RETRY_SMALLER_SCALE, reading, clean=False)


def _fails(lab: Lab, case: Case, last: Reading | None) -> bool:
    """The failure is there on the port's present state too."""
    if case.trigger is Trigger.RUNAWAY:
        calm = calm_level(finite(case.past.get("recent_losses", ())))
        return last is None or calm is None or not last.loss <= limit_of(calm)
    return lab.shoot().bad


@dataclass(frozen=True, slots=True)
class _Change:
    """The largest difference in one tensor."""

    name: str
    index: tuple[int, ...]
    value: float
    """As the failing step found it."""
    was: float
    """As it should have been."""
    num: int
    size: float
    """In units of the tensor's root mean square."""

    def suspect(self) -> Suspect:
        """The tensor, as the scan of the state names one."""
        kind = "moment" if "|" in self.name else "parameter"
        data = {"index": list(self.index), "value": self.value, "was": self.was, "num_bad": self.num}
        if len(self.index) > 1:
            data["row"] = self.index[0]
        return Suspect(kind, self.name, {**data, "what": "changed", "relative_change": self.size})


def _changes(found: Mapping[str, torch.Tensor], redone: Mapping[str, torch.Tensor]) -> list[_Change]:
    """Tensors that differ in any bit, the largest relative change first."""
    changes = [_change(name, found[name], t.detach().cpu()) for name, t in redone.items() if name in found]
    return sorted((c for c in changes if c is not None), key=lambda c: (c.size <= math.inf, -c.size))


def _change(name: str, found: torch.Tensor, redone: torch.Tensor) -> _Change | None:
    found = found.cpu()
    if found.shape != redone.shape or torch.equal(found, redone):
        return None
    away = torch.nan_to_num((found.double() - redone.double()).abs(), nan=math.inf).reshape(-1)
    place = int(away.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), found.shape)) if found.dim() else ()
    usual = float(redone.double().square().mean().sqrt())
    size = float(away[place]) / usual if usual > 0 else math.inf
    value, was = float(found.reshape(-1)[place]), float(redone.reshape(-1)[place])
    return _Change(name, index, value, was, int((away > 0).sum()), size)
