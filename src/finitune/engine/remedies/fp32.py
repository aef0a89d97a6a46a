"""fp32: the run computes in fp32.

What it does:
    Changes the number format of all products, and of weights and moments where they were half.

What it costs:
    Speed and memory; no data, no progress.

When it is taken back:
    After the probation, where the failure was one of range and its numbers stand a bit below the limit again. After a
    relapse, and where the weights themselves were half, it stays.

Source:
    Micikevicius et al. 2018, "Mixed Precision Training", section 3 (what half precision needs, and fp32 does not)
"""

from __future__ import annotations

from collections.abc import Iterable

from finitune.core.incident import Cause, Safety, Words
from finitune.engine.case import Case
from finitune.engine.conditions import Conditions
from finitune.engine.plan import Plan
from finitune.engine.remedies import _rungs as rungs

SAFETY = Safety.SAFE
SAYS = Words(
    "The run computes in fp32 from now on (before: {was}).",
    "从现在起以 fp32 计算（此前：{was}）。",
)
ADVICE = Words(
    "precision: fp32, or precision: bf16 on a device that has it",
    "precision: fp32；设备支持时也可用 precision: bf16",
)


def plans(case: Case, cause: Cause, now: Conditions) -> Iterable[Plan]:
    """Unless it is in force already, or was tried and is no cure."""
    if not rungs.is_half(case, now) or rungs.is_impossible(case, "fp32"):
        return
    yield rungs.change(
        "fp32",
        Safety.SAFE,
        now,
        {"precision": "fp32"},
        temporary=rungs.is_about_range(case) and not rungs.relapses(case, cause, "fp32"),
        to_step=rungs.first_skipped(case),
        was=rungs.computes_in(case, now) or "-",
    )
