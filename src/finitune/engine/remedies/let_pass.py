"""Let pass: the step is committed although a detector refused it, because it was shown to be harmless.

What it does:
    Commits the step as it is. Where nothing has failed yet (a forecast, a silent fault) it leaves the run as it is.

What it costs:
    Nothing. A row that is only rare is learnt from instead of lost.

When it is taken back:
    It is not; the next steps are judged as any other.

Source:
    Chowdhery et al. 2022, "PaLM", section 5.1 (most spikes do not depend on the batch alone)
"""

from __future__ import annotations

from collections.abc import Iterable

from finitune.core.incident import Cause, Safety, Trigger, Words
from finitune.engine.case import Case
from finitune.engine.conditions import Conditions
from finitune.engine.plan import BatchFate, Plan

SAFETY = Safety.SAFE
SAYS = Words(
    "Step {step} (loss {loss}) is taken as it is: it does no harm.",
    "第 {step} 步（损失 {loss}）按原样采用：它没有危害。",
)
ADVICE = Words(
    "Nothing; if it is reported often, widen the detector that refused it.",
    "无需处理；若经常出现，请放宽拒绝它的检测器。",
)


def plans(case: Case, cause: Cause, now: Conditions) -> Iterable[Plan]:  # noqa: ARG001
    """For an outlier that did no harm on a replay, or where nothing has failed."""
    unfailed = case.trigger in (Trigger.FORECAST, Trigger.SILENT)
    harmless = case.trigger is Trigger.OUTLIER and case.good("let_pass")
    if unfailed or harmless:
        data = {"step": case.reading.step, "loss": case.reading.loss}
        yield Plan("let_pass", Safety.SAFE, now, fate=BatchFate.PASS, data=data)
