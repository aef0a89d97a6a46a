"""Clip: gradients are clipped to a fixed norm, the one that the experiment proved.

What it does:
    Goes back to where the experiment started and clips to its norm from there on. After a relapse: to half of it.

What it costs:
    The steps since then are computed anew; steps with a large gradient become shorter.

When it is taken back:
    It stays.

Source:
    Pascanu et al. 2013, "On the difficulty of training recurrent neural networks", section 3.2
"""

from __future__ import annotations

from collections.abc import Iterable

from finitune.core.incident import Cause, Safety, Trigger, Words
from finitune.engine.case import Case
from finitune.engine.conditions import Conditions
from finitune.engine.plan import Plan
from finitune.engine.remedies import _rungs as rungs

SAFETY = Safety.LOSSY
SAYS = Words(
    "Gradients are clipped to a norm of {max_grad_norm} from step {from_step} on.",
    "从第 {from_step} 步起，梯度裁剪到范数 {max_grad_norm}。",
)
ADVICE = Words("max_grad_norm: {max_grad_norm}", "max_grad_norm: {max_grad_norm}")


def plans(case: Case, cause: Cause, now: Conditions) -> Iterable[Plan]:
    """From where the experiment started; for a single outlier, at the usual norm and without going back."""
    present = min(_norms(now.max_grad_norm, case.facts.get("max_grad_norm")), default=None)
    past = rungs.relapses(case, cause, "clip")
    for norm, to_step in _wanted(case):
        tight = norm if not past else min(norm, *_norms(present)) / 2
        if present is None or tight < present:
            yield rungs.change(
                "clip",
                Safety.LOSSY,
                now,
                {"max_grad_norm": tight},
                to_step=to_step,
                max_grad_norm=tight,
                from_step=case.reading.step if to_step is None else to_step + 1,
            )


def _wanted(case: Case) -> Iterable[tuple[float, int | None]]:
    """Norm and state to start from."""
    if case.bad("tighter_clip"):
        return
    usual = _norms(case.past.get("median_grad_norm"))
    if case.trigger is Trigger.OUTLIER and usual:
        yield usual[0], None
    norm, start = (
        _norms(case.number("tighter_clip", "max_grad_norm")),
        rungs.step(case.number("tighter_clip", "start_step")),
    )
    if case.good("tighter_clip") and norm and start is not None:
        yield norm[0], start


def _norms(*values: object) -> list[float]:
    """Those that can be clipped to."""
    return [n for v in values if (n := rungs.number(v)) is not None and n > 0]
