"""Reset moments: the optimizer forgets what it holds of the parameters concerned.

What it does:
    Drops their moments and their step count, so that bias correction starts anew. The tensors concerned first; all
    that the experiment reset only if that does not hold.

What it costs:
    The memory of some tens to hundreds of steps in these tensors; the weights keep what they learnt.

When it is taken back:
    It is not; the moments fill again.

Source:
    Huang et al. 2025, "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training"
"""

from __future__ import annotations

from collections.abc import Iterable

from finitune.core.incident import Cause, Safety, Words
from finitune.engine.case import Case
from finitune.engine.conditions import Conditions
from finitune.engine.plan import Mend, Operation, Plan
from finitune.engine.remedies import _rungs as rungs

SAFETY = Safety.LOSSY
SAYS = Words(
    "The optimizer's moments of {count} parameters start anew: {names}.",
    "{count} 个参数的优化器矩重新开始：{names}。",
)
ADVICE = Words(
    "Nothing in the recipe; if it comes back, look at the machine and at the optimizer's version.",
    "配置无需修改；若再次出现，请检查机器和优化器的版本。",
)


def plans(case: Case, cause: Cause, now: Conditions) -> Iterable[Plan]:  # noqa: ARG001
    """Not where fresh moments were tried and do not help."""
    if case.bad("fresh_moments"):
        return
    concerned = _concerned(case)
    every = rungs.names(case.number("fresh_moments", "parameters", ()))
    for names in dict.fromkeys((concerned, every)):
        if names:
            data = {"count": len(names), "names": rungs.listed(names)}
            mends = (Mend(Operation.RESET_MOMENTS, names),)
            yield Plan("reset_moments", Safety.LOSSY, now, mends=mends, data=data)


def _concerned(case: Case) -> tuple[str, ...]:
    """Parameters of the moments under suspicion; a moment is named ``PARAMETER|SLOT``."""
    only = rungs.names(case.number("fresh_moments", "only", ()))
    if only:
        return only
    held = [str(s.data.get("parameter") or s.name.rpartition("|")[0]) for s in case.suspects_of("moment")]
    held += [m.rpartition("|")[0] for m in rungs.names(case.number("scan_state", "moments", ()))]
    return tuple(dict.fromkeys(name for name in held if name))
