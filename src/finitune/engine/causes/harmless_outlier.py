"""Harmless outlier: a rare kind of sample with a high loss; the run takes it and goes on as before.

What it sees:
    A detector refused a finite loss or gradient norm far outside of the past. The step was committed on a replay, and
    the losses of known batches after it stay near those before.

Why it is bad:
    It is not. To skip it would lose the very samples that the model knows least, and to lower a rate or tighten a
    clip for it would slow down everything else.

Example:
    a table among prose: loss 9.1 where 2.4 is usual; after the update known batches have 2.41, before 2.42

What to do:
    Nothing. If it happens often, the detector is too narrow for this data: raise its factor.

Source:
    Chowdhery et al. 2022, "PaLM", section 5.1 (a spike comes of a batch together with a state: the same batch
    elsewhere makes none)
"""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.incident import Trigger
from finitune.core.types import Severity
from finitune.engine.case import Case
from finitune.engine.causes import _signs as signs
from finitune.engine.weight import Reasons, Weight

CAUSE = Code(
    "NUM406",
    Severity.NOTE,
    Text(
        "cause: a rare sample, and no harm",
        "Step {step} has loss {loss} and gradient norm {grad_norm}, far from the usual. Committed on a replay, known "
        "batches have loss {after} after it and {before} before it.",
        "Samples that are rare have a high loss by nature. The step was tried and harms nothing, so it is taken.",
        (
            "nothing: the step was let through",
            "if this is reported often: guard.detectors.loss_spike.factor, somewhat larger",
        ),
    ),
    Text(
        "原因：罕见样本，没有危害",
        "第 {step} 步的损失为 {loss}、梯度范数为 {grad_norm}，远离平常。在重放中提交该步之后，已知各批的损失为 "
        "{after}，之前为 {before}。",
        "罕见样本的损失本来就高。该步已试过，没有造成危害，因此予以采用。",
        ("无需处理：该步已放行", "若经常出现：适当增大 guard.detectors.loss_spike.factor"),
    ),
)
CODES = (CAUSE,)
FAULT_CLASS = "N"
REMEDIES = ("let_pass",)

_LIFTED = 2.0


def weigh(case: Case) -> Weight | None:
    """Named where the step was let through and did no harm."""
    if case.trigger is not Trigger.OUTLIER:
        return None
    reasons = Reasons()
    # The losses around it stay as they were; but where they are lifted already, that shows nothing.
    harmless = case.good("let_pass") and not _is_lifted(case)
    reasons.proof(harmless, "let_pass", 0.9)
    reasons.against(case.bad("scan_state"), "scan_state", 0.1)
    reasons.against(signs.is_half(case) and case.good("fp32"), "fp32", 0.6)
    reasons.against(case.bad("update_share"), "update_share", 0.7)
    return reasons.weight(
        step=case.reading.step,
        loss=case.reading.loss,
        grad_norm=case.reading.grad_norm,
        before=signs.shown(_mean(case.number("let_pass", "before"))),
        after=signs.shown(_mean(case.number("let_pass", "after"))),
    )


def _is_lifted(case: Case) -> bool:
    """The losses before the step are far above the run's median: it is running away."""
    before, usual = _mean(case.number("let_pass", "before")), signs.number(case.past.get("median_loss"))
    return before is not None and usual is not None and before > max(_LIFTED * usual, usual + 1.0)


def _mean(losses: object) -> float | None:
    """The mean of a list of losses, or the number itself."""
    values = losses if isinstance(losses, list | tuple) else [losses]
    found = [n for v in values if (n := signs.number(v)) is not None]
    return sum(found) / len(found) if found else None
