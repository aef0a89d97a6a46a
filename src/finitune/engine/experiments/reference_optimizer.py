"""Reference optimizer: the update by the plain formula in fp32, next to the one that the run's optimizer makes.

What it changes:
    The update is made and undone; the same gradients, moments and rate go through the formula on copies.

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
from typing import Any

import torch

from finitune.core.incident import Result, Suspect, Trigger, Words
from finitune.engine.case import Case
from finitune.engine.conditions import NotPossible
from finitune.engine.experiments._formulas import formula_of
from finitune.engine.experiments._tools import Findings, evidence
from finitune.engine.experiments.update_share import commit
from finitune.engine.lab import Lab

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


def wanted(case: Case) -> bool:
    """The update is under suspicion, and neither eps nor the state explain it.

    Fresh moments are no explanation: they heal a wrong optimizer for some steps as well as bad moments.
    """
    explained = case.good("adam_eps") or case.bad("scan_state")
    return case.trigger in (Trigger.UPDATE, Trigger.RUNAWAY, Trigger.SILENT) and not explained


def run(lab: Lab, case: Case) -> Findings:  # noqa: ARG001
    """Both updates of the failing step. Raises NotPossible for an optimizer without a formula here, BudgetSpent."""
    optimizer = lab.port.optimizer
    update = formula_of(optimizer)
    expected: dict[str, torch.Tensor] = {}
    was = {name: p.detach().clone() for name, p in lab.port.parameters()}

    def before_step(*_: Any) -> None:
        if expected:
            return  # an optimizer that calls its parent's step() comes here twice, the second time in the midst of it
        with torch.no_grad():
            expected.update({n: update(p) for n, p in lab.port.parameters() if p.grad is not None})

    handle = optimizer.register_step_pre_hook(before_step)
    try:
        with lab.standing_at(lab.before):
            commit(lab)
            now = {name: p.detach().clone() for name, p in lab.port.parameters()}
    finally:
        handle.remove()
    if not expected:
        raise NotPossible("the trainer does not update through its optimizer's step()")
    return _compared(was, expected, now)


def _compared(
    was: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], now: dict[str, torch.Tensor]
) -> Findings:
    differences = {n: relative_difference(was[n], expected[n], now[n]) for n in expected}
    if not any(math.isfinite(float(t.sum())) for t in expected.values()):
        raise NotPossible("the formula gives no finite update either")
    worst = max(differences, key=lambda n: differences[n])
    good = not differences[worst] <= GROSS
    suspects = (Suspect("parameter", worst, {"update_difference": differences[worst]}),) if good else ()
    return evidence("reference_optimizer", good, max_rel_difference=differences[worst], parameter=worst), suspects


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
