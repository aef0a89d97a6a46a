"""Roll back: the run returns to an older state and goes on from there.

What it does:
    Returns to the newest state at which the same batch is good, and after each relapse to an older one.

What it costs:
    The steps since then are computed anew.

When it is taken back:
    It is not.

Source:
    Chowdhery et al. 2022, "PaLM", section 5.1 (restart from a checkpoint some hundred steps before the spike)
"""

from __future__ import annotations

from collections.abc import Iterable

from finitune.core.incident import Cause, Safety, Words
from finitune.engine.case import Case
from finitune.engine.conditions import Conditions
from finitune.engine.plan import Plan
from finitune.engine.remedies import _rungs as rungs

SAFETY = Safety.LOSSY
SAYS = Words(
    "The run goes back to step {to_step}: {steps} steps are computed anew.",
    "回到第 {to_step} 步：重新计算 {steps} 步。",
)
ADVICE = Words("Nothing in the recipe.", "配置无需修改。")

_MOST = 3


def plans(case: Case, cause: Cause, now: Conditions) -> Iterable[Plan]:
    """States that are known to be good, newest first; those of earlier relapses are left out."""
    newest = rungs.newest_step(case)
    known = _good_steps(case, newest)
    for to_step in known[rungs.relapses(case, cause, "roll_back") :][:_MOST]:
        data = {"to_step": to_step, "steps": newest - to_step}
        yield Plan("roll_back", Safety.LOSSY, now, to_step=to_step, data=data)


def _good_steps(case: Case, newest: int) -> tuple[int, ...]:
    """Where the experiment found the batch good, and the states before a tensor went bad."""
    shown = case.number("older_weights", "good", ())
    found = {*rungs.steps(shown), *rungs.steps([case.number("older_weights", "newest_good")])}
    if not case.good("older_weights"):
        found.clear()
    before = rungs.before_it_went_bad(case)
    if before is not None:
        found = {s for s in found | {before} if s <= before}
    return tuple(sorted((s for s in found if s < newest), reverse=True))
