"""Lower the learning rate: back to before the rise, a smaller rate, a short warm-up. Only where it was proved.

What it does:
    Goes back to the state at which the experiment started and multiplies the scheduled rate by 1/2, 1/10 or 1/100; it
    rises from 0 over the first half of the way back. After relapses: 1/10 at once, then from further back.

What it costs:
    The steps since then are computed anew, and every step after them is shorter.

When it is taken back:
    It stays; the schedule goes on, scaled.

Source:
    https://github.com/haotian-liu/LLaVA/issues/1375 (where it was the cause); Goyal et al. 2017, "Accurate, Large
    Minibatch SGD", section 2.2 (warm-up)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from finitune.core.incident import Cause, Safety, Words
from finitune.engine.case import Case
from finitune.engine.conditions import Conditions
from finitune.engine.plan import Plan
from finitune.engine.remedies import _rungs as rungs

SAFETY = Safety.LOSSY
SAYS = Words(
    "The run goes back to step {from_step}, and the learning rate is {factor} of the scheduled one from there on.",
    "回到第 {from_step} 步，此后学习率为计划值的 {factor}。",
)
ADVICE = Words(
    "learning_rate: {lr}, with a warm-up",
    "learning_rate: {lr}，并使用预热",
)

_RISE = 1.5
"""A loss above this many times the usual one is not cured (as in the proof of a plan)."""
_RISE_NATS = 0.5


def plans(case: Case, cause: Cause, now: Conditions) -> Iterable[Plan]:
    """Nothing without the experiment's proof."""
    start = rungs.step(case.number("lower_lr", "start_step"))
    if not case.good("lower_lr") or start is None:
        return
    past = rungs.relapses(case, cause, "lower_lr")
    least = rungs.number(case.number("lower_lr", "factor")) or 0.1
    rungs_left = [(0.5, start)] if not past and _half_is_enough(case) else []
    rungs_left += [(least, start)] if past < 2 else []
    rungs_left += [(least, further) for further in _further(case, start)]
    for factor, to_step in rungs_left:
        yield _plan(case, now, factor, to_step)


def _plan(case: Case, now: Conditions, factor: float, to_step: int) -> Plan:
    scaled = now.lr_factor * factor
    rate = rungs.number(case.reading.lr)
    changes = {"lr_factor": scaled, **_warmup(case, to_step)}
    lr = rate * factor if rate is not None else "-"
    numbers = {"factor": f"{scaled:g}", "lr": lr, "from_step": to_step}
    return rungs.change("lower_lr", Safety.LOSSY, now, changes, to_step=to_step, **numbers)


def _warmup(case: Case, to_step: int) -> dict[str, Any]:
    """Over half of the way back, so that the proof sees the full rate too; none where updates are not counted."""
    updates = rungs.step(case.past.get("updates"))
    back = rungs.newest_step(case) - to_step
    if updates is None or back < 2:
        return {}
    return {"warmup_from_update": max(0, updates - back), "warmup_steps": back // 2}


def _half_is_enough(case: Case) -> bool:
    """Half of the rate ended near the loss of before, as far as is known."""
    told = case.number("lower_lr", "half_good")
    if isinstance(told, bool):
        return told
    losses = case.number("lower_lr", "losses_half")
    if not isinstance(losses, list | tuple) or not losses:
        return False
    last = rungs.number(losses[-1])
    usual = rungs.number(case.number("lower_lr", "median_loss", case.past.get("median_loss")))
    return last is not None and (usual is None or last <= max(usual * _RISE, usual + _RISE_NATS))


def _further(case: Case, start: int) -> tuple[int, ...]:
    """An older state: one that is known to be good, or twice as far back."""
    good = [s for s in rungs.steps(case.number("older_weights", "good", ())) if s < start]
    twice = 2 * start - rungs.newest_step(case)
    return tuple(good[:1]) or ((twice,) if 0 <= twice < start else ((0,) if start > 0 else ()))
