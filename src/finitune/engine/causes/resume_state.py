"""Resume state: the run was resumed, and part of its state did not come with it.

What it sees:
    A check found that the state after a resume is not that of the checkpoint (rate, step count, moments, scale); or a
    failure shortly after a resume goes away with fresh moments while weights and moments are finite.

Why it is bad:
    Moments of another run or a rate from the start move good weights as if nothing had been learnt. The loss may not
    even show it: compare the state, not the loss.

Example:
    after a resume the rate is 1e-3 again instead of 2e-5: loss 0.158, before 0.023

What to do:
    Save and load optimizer, schedule, scaler, random state and data position, and check them before the first step.

Source:
    https://github.com/NVIDIA-NeMo/Automodel/issues/763 , https://github.com/NVIDIA-NeMo/Automodel/pull/2511 ,
    https://github.com/D-X-Y/NAS-Bench-201/issues/19
"""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity
from finitune.engine.case import Case
from finitune.engine.causes import _signs as signs
from finitune.engine.weight import REFUTED, Reasons, Weight

# A wrong moment of Adam (beta2 = 0.999) or a wrong rate shows itself within some steps of the resume.
_SOON_STEPS = 50

CAUSE = Code(
    "OPT405",
    Severity.ERROR,
    Text(
        "cause: the state after the resume is not that of before",
        "The run was resumed at step {resumed_step}; step {step} fails, and is fine under: {cured_by}. What differs: "
        "{differs}.",
        "Weights without their moments, schedule and scale are not the state that was saved. The loss often hides it "
        "at "
        "first.",
        (
            "finitune train --resume RUN restores all of it and checks it; do not start a new run from the weights",
            "in a script: save and load optimizer, scheduler, scaler, random state and data position together",
            "compare rate, step count and norms of the moments before and after loading",
        ),
    ),
    Text(
        "原因：恢复后的状态与之前不同",
        "训练在第 {resumed_step} 步恢复；第 {step} 步失败，在以下条件下正常：{cured_by}。不同之处：{differs}。",
        "没有矩、学习率计划和缩放的权重，并不是当初保存的状态。损失一开始往往看不出来。",
        (
            "finitune train --resume RUN 会恢复并检查全部状态；不要从权重另起一次训练",
            "在脚本中：把优化器、计划、缩放器、随机状态和数据位置一起保存和加载",
            "加载前后比较学习率、步数和各个矩的范数",
        ),
    ),
)
CODES = (CAUSE,)
FAULT_CLASS = "U"
REMEDIES = ("reset_moments", "roll_back", "lower_lr")


def weigh(case: Case) -> Weight | None:
    """Named by the check of the state, or by fresh moments soon after a resume."""
    resumed = signs.number(case.facts.get("resumed_step"))
    soon = resumed is not None and 0 <= case.reading.step - resumed <= _SOON_STEPS
    reasons = Reasons()
    reasons.proof(signs.is_told(case, CAUSE.code), "trigger", 0.9)
    reasons.hint(soon, "facts", 0.25)
    reasons.proof(soon and case.good("fresh_moments"), "fresh_moments", 0.75)
    reasons.against(case.bad("scan_state"), "scan_state", REFUTED)
    reasons.against(case.bad("fresh_moments"), "fresh_moments", 0.3)
    reasons.against(case.good("rows"), "rows", 0.4)
    reasons.against(signs.is_half(case) and signs.precision_cures(case), signs.cured_by(case, "fp32", "bf16"), 0.4)
    return reasons.weight(
        case.finding.where,
        step=case.reading.step,
        resumed_step=signs.shown(resumed),
        cured_by=signs.cured_by(case, "fresh_moments", "older_weights"),
        differs=signs.shown(case.finding.data.get("differs")),
    )
