"""Reference optimizer: the update by the plain formula in fp32, next to the one that the run's optimizer makes.

What it changes:
    The update is made and undone; the same gradients, moments and rate go through the formula on copies. Where the
    failing step makes no update (its loss or gradients are not finite), it is the last one before it.

What each outcome says:
    GOOD: the formula stays finite where the optimizer does not, or the two differ grossly. The implementation (a fused
    or 8-bit kernel, or half-precision arithmetic) is at fault.
    BAD: both come to the same. The optimizer does what it is asked to.

What it costs:
    One replay and an fp32 copy of the weights.

Source:
    https://github.com/bitsandbytes-foundation/bitsandbytes/issues/152 (an 8-bit Adam that gave NaN where fp32 did not);
    Kingma & Ba 2015 (arXiv:1412.6980, algorithm 1), Loshchilov & Hutter 2019 (arXiv:1711.05101, algorithm 2);
    SGD as in https://docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import torch

from finitune.core.incident import Result, Suspect, Trigger, Words
from finitune.core.types import Reading
from finitune.engine.case import Case
from finitune.engine.conditions import NotPossible
from finitune.engine.direction import is_plain
from finitune.engine.experiments._course import limit_of
from finitune.engine.experiments._formulas import Made, whole_formula_of
from finitune.engine.experiments._tools import (
    Findings,
    evidence,
    fails_in_step,
    finite,
    is_elsewhere,
    precision_explains,
)
from finitune.engine.experiments._updates import of_the_loss, standing_before_it
from finitune.engine.experiments.update_share import commit
from finitune.engine.lab import Lab
from finitune.engine.policy import Action
from finitune.numerics.seeds import generators_kept

ORDER = 64
COST = 1.0
SAYS = {
    Result.GOOD: Words(
        "The plain formula in fp32 gives another update for {parameter} (relative difference {max_rel_difference}).",
        "用 fp32 的标准公式得到的 {parameter} 的更新不同（相对差异 {max_rel_difference}）。",
    ),
    Result.BAD: Words(
        "The plain formula in fp32 gives the same updates (largest relative difference {max_rel_difference}).",
        "用 fp32 的标准公式得到相同的更新（最大相对差异 {max_rel_difference}）。",
    ),
}
# fp32 arithmetic in another order differs by far less; a wrong formula by far more.
GROSS = 0.1
CLEARLY = 1.05
"""The loss of the run is above that of the course with the formula's updates by at least this factor."""
_BACK, _TAIL = 8, 3


def wanted(case: Case) -> bool:
    """The updates are under suspicion, and neither eps nor the state explain it.

    Fresh moments are no explanation: they heal a wrong optimizer for some steps as well as bad moments. Where the step
    itself fails, the updates before it are to be suspected once batches that went well fail too.
    """
    if case.good("adam_eps") or case.bad("scan_state") or case.bad("past_loss") or of_the_loss(case):
        return False
    if case.trigger in (Trigger.UPDATE, Trigger.RUNAWAY, Trigger.SILENT):
        return True
    spoilt = fails_in_step(case) and case.bad("known_good_batch") and not precision_explains(case)
    return spoilt and not case.has_half_weights and not is_elsewhere(case)


def run(lab: Lab, case: Case) -> Findings:
    """Both updates; where they differ and the run went wrong by degrees, the last steps with the formula's updates.

    Raises NotPossible for an optimizer without a formula here, BudgetSpent.
    """
    with standing_before_it(lab, case):
        was = {name: p.detach().clone() for name, p in lab.port.parameters()}
        _, expected = _both(lab)
        now = {name: p.detach().clone() for name, p in lab.port.parameters()}
    if not any(math.isfinite(float(t.sum())) for t in expected.values()):
        raise NotPossible("the formula gives no finite update either")
    differences = {n: relative_difference(was[n], expected[n], now[n]) for n in expected}
    worst = max(differences, key=lambda n: differences[n])
    numbers: dict[str, Any] = {"max_rel_difference": differences[worst], "parameter": worst}
    good = not differences[worst] <= GROSS
    if good and case.trigger not in (Trigger.UPDATE, Trigger.SILENT):
        good, losses = _cures(lab, case)
        numbers["losses"] = losses
    elif good:
        good = is_plain(lab.port.optimizer) or not math.isfinite(differences[worst])
    suspects = (Suspect("parameter", worst, {"update_difference": differences[worst]}),) if good else ()
    return evidence("reference_optimizer", good, **numbers), suspects


def _both(lab: Lab, *, keep: bool = False) -> tuple[Reading, dict[str, torch.Tensor]]:
    """Make the update of the step at hand. Its numbers, and what the formula makes of the same gradients and moments.

    ``keep``: the formula's weights and moments stay, instead of the optimizer's.
    """
    optimizer, parameters = lab.port.optimizer, lab.port.parameters()
    update = whole_formula_of(optimizer)
    made: dict[str, Made] = {}

    def before_step(*_: Any) -> None:
        if made:
            return  # an optimizer that calls its parent's step() comes here twice, the second time in the midst of it
        with torch.no_grad():
            made.update({n: update(p) for n, p in parameters if p.grad is not None})

    handle = optimizer.register_step_pre_hook(before_step)
    try:
        reading = commit(lab)
    finally:
        handle.remove()
    if not made:
        raise NotPossible("the trainer does not update through its optimizer's step()")
    if keep:
        _put(optimizer, dict(parameters), made)
    return reading, {name: weight for name, (weight, _) in made.items()}


@torch.no_grad()
def _put(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter], made: dict[str, Made]) -> None:
    for name, (weight, moments) in made.items():
        parameters[name].copy_(weight)
        state = optimizer.state.get(parameters[name], {})
        for slot, moment in moments.items():
            if isinstance(state.get(slot), torch.Tensor):
                state[slot].copy_(moment)


def _cures(lab: Lab, case: Case) -> tuple[bool, list[float]]:
    """Whether the loss does not rise with the formula's updates where it did with the optimizer's; and its course."""
    recent = finite(case.past.get("recent_losses", ()))
    back = min(_BACK, lab.before.step, len(recent))
    start = lab.state_at(lab.before.step - back) if back > 0 else None
    made = [s.record.get("updates", s.step) for s in (start, lab.before) if s is not None]
    if start is None or made[0] + back != made[-1]:
        raise NotPossible("the steps before the failure cannot be walked again")
    losses: list[float] = []
    with generators_kept(), lab.standing_at(start):
        try:
            for _ in range(back):
                reading, _ = _both(lab, keep=True)
                lab.port.settle(Action.PROCEED, reading, clean=False)
                losses.append(reading.loss)
        except NotPossible:  # the loss or a gradient is not finite with the formula's updates either
            return False, losses
    level, then = fmean(losses[-_TAIL:]), fmean([*recent, case.reading.loss][-_TAIL:])
    return level <= limit_of(losses[0]) and not then <= level * CLEARLY, losses


def relative_difference(was: torch.Tensor, expected: torch.Tensor, now: torch.Tensor) -> float:
    """||now - expected|| / ||expected - was|| in fp32, less what rounding to the weight's format explains.

    inf where ``now`` is not finite and ``expected`` is; 0 where ``expected`` is not finite.
    """
    if not bool(torch.isfinite(expected).all()):
        return 0.0
    if not bool(torch.isfinite(now).all()):
        return math.inf
    rounding = torch.finfo(was.dtype).eps * float(torch.linalg.vector_norm(expected))
    excess = max(0.0, float(torch.linalg.vector_norm(now.float() - expected)) - rounding)
    step = float(torch.linalg.vector_norm(expected - was.float()))
    return excess / step if step > 0 else (math.inf if excess > 0 else 0.0)
