"""Lower the learning rate: back to before the rise, a smaller rate from there on. Only where it was proved.

What it does:
    Where the schedule had raised the rate: goes back to before the first update at the higher rate, and from there on
    the rate is at most the one that the run had borne until then; where the schedule comes down below that, it is
    followed as before. After a relapse at most half of that.
    Elsewhere: goes back to the state at which the experiment started and multiplies every scheduled rate, the coming
    ones too, by the share that was proved; it rises from 0 over a few steps. Then a third of that; after relapses from
    further back, too.

What it costs:
    The steps since then are computed anew. A share shortens every step after them; a limit only those above it.

When it is taken back:
    It stays; the schedule goes on, scaled or cut off.

Source:
    https://github.com/haotian-liu/LLaVA/issues/1375 (where it was the cause); Goyal et al. 2017, "Accurate, Large
    Minibatch SGD", section 2.2 (warm-up)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from finitune.core.incident import Cause, Safety, Trigger, Words
from finitune.engine.case import Case
from finitune.engine.conditions import Conditions
from finitune.engine.plan import Plan
from finitune.engine.remedies import _rungs as rungs

SAFETY = Safety.LOSSY
SAYS = Words(
    "The run goes back to step {from_step}; where the schedule asks for a learning rate of {was} it gets {lr} from "
    "there on.",
    "回到第 {from_step} 步；此后计划学习率为 {was} 处实际使用 {lr}。",
)
ADVICE = Words(
    "learning_rate: {lr} where it is {was}, with a warm-up",
    "learning_rate：把 {was} 处改为 {lr}，并使用预热",
)

_TENTH, _HALF = 0.1, 0.5
_FROM_HERE = 2
"""Relapses after which the state that the experiment began at is not trusted any more."""


def plans(case: Case, cause: Cause, now: Conditions) -> Iterable[Plan]:
    """What was proved, then a third of it, then from further back. Nothing without the experiment's proof."""
    if case.good("borne_rate"):
        yield from _limited(case, now)
    start = rungs.step(case.number("lower_lr", "start_step"))
    if not case.good("lower_lr") or start is None:
        return
    factor = rungs.number(case.number("lower_lr", "factor")) or _TENTH
    past = rungs.relapses(case, cause, "lower_lr")
    rungs_left = [(factor, start), (factor / 3, start)] if past < _FROM_HERE else []
    rungs_left += [(factor / 3, further) for further in _further(case, start)]
    for share, to_step in rungs_left:
        yield _plan(case, now, share, to_step)


def _limited(case: Case, now: Conditions) -> Iterable[Plan]:
    """The rate that the run bore before it was raised, then half of it."""
    start, limit = rungs.step(case.number("borne_rate", "start_step")), rungs.number(case.number("borne_rate", "limit"))
    if start is None or limit is None or not limit > 0:
        return
    to_step = start if start < rungs.newest_step(case) or case.trigger is Trigger.RUNAWAY else None
    was = case.number("borne_rate", "was")
    for most in (limit, limit * _HALF):
        numbers = {"from_step": start, "was": was, "lr": most * now.lr_factor}
        yield rungs.change("lower_lr", Safety.LOSSY, now, {"max_lr": most}, to_step=to_step, **numbers)


def _plan(case: Case, now: Conditions, factor: float, to_step: int) -> Plan:
    scaled = now.lr_factor * factor
    rate = rungs.number(case.reading.lr)
    changes = {"lr_factor": scaled, **_warmup(case, to_step)}
    lr = rate * factor if rate is not None else "-"
    numbers = {"factor": f"{scaled:.3g}", "lr": lr, "was": "-" if rate is None else rate, "from_step": to_step}
    return rungs.change("lower_lr", Safety.LOSSY, now, changes, to_step=to_step, **numbers)


def _warmup(case: Case, to_step: int) -> dict[str, Any]:
    """As in the experiment; from further back, that much earlier. None where the schedule is still warming up."""
    start, steps = rungs.step(case.number("lower_lr", "start_step")), case.number("lower_lr", "warmup_steps")
    since = rungs.step(case.number("lower_lr", "warmup_from_update"))
    if start is None or since is None or not isinstance(steps, int):
        return {}
    return {"warmup_from_update": max(0, since - (start - to_step)), "warmup_steps": steps}


def _further(case: Case, start: int) -> tuple[int, ...]:
    """An older state: one that is known to be good, or twice as far back."""
    good = [s for s in rungs.steps(case.number("older_weights", "good", ())) if s < start]
    twice = 2 * start - rungs.newest_step(case)
    return tuple(good[:1]) or ((twice,) if 0 <= twice < start else ((0,) if start > 0 else ()))
