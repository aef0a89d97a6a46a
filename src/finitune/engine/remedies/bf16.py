"""bf16: the run computes in bf16 instead of fp16. It has the range of fp32 and needs no loss scale.

What it does:
    Changes the number format of all products.

What it costs:
    3 bits of mantissa against fp16 (8 instead of 11); no data, no progress. As fast as fp16 where the device has it.

When it is taken back:
    After the probation, where the failure was one of range and its numbers stand a bit below the limit again. After a
    relapse, and where the weights themselves were half, it stays.

Source:
    Kalamkar et al. 2019, "A Study of BFLOAT16 for Deep Learning Training"
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
    "The run computes in bf16 from now on (before: {was}).",
    "从现在起以 bf16 计算（此前：{was}）。",
)
ADVICE = Words(
    "precision: bf16",
    "precision: bf16",
)


def plans(case: Case, cause: Cause, now: Conditions) -> Iterable[Plan]:
    """Unless it is in force already, or was tried and is no cure."""
    if not _is_fp16(case, now) or rungs.is_impossible(case, "bf16"):
        return
    yield rungs.change(
        "bf16",
        Safety.SAFE,
        now,
        {"precision": "bf16"},
        temporary=rungs.is_about_range(case) and not rungs.relapses(case, cause, "bf16"),
        to_step=rungs.first_skipped(case),
        was=rungs.computes_in(case, now) or "-",
    )


def _is_fp16(case: Case, now: Conditions) -> bool:
    """fp16 is in use and nothing better has been chosen already."""
    return now.precision is None and (case.is_half or case.has_half_weights)
