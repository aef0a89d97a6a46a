"""Optimizer bug: from finite weights, moments and gradients the optimizer makes numbers that a plain one does not.

What it sees:
    The update makes the state non-finite, or carries the run away, and a plain fp32 optimizer of the same kind, given
    the same gradients and moments, makes another one. A larger eps and wider weights do not explain it.
    Or an update is made against the optimizer's own first moment, seen in the run and again on a replay.

Why it is bad:
    Loss and gradients are beyond suspicion, so the data, the precision and the rate are tried one after the other. A
    wrong quantisation map of 8-bit moments did this in several versions of one package.

Example:
    8-bit Adam: NaN in layers.0.mlp.up_proj.weight; plain AdamW on the same gradients: finite.
    A group of the weights is moved uphill: the loss falls more slowly than it should, and nothing is NaN.

What to do:
    Another version or another implementation of the optimizer (optim: adamw_torch).

Source:
    https://github.com/bitsandbytes-foundation/bitsandbytes/issues/227 ,
    https://github.com/bitsandbytes-foundation/bitsandbytes/issues/152 ,
    https://github.com/kohya-ss/sd-scripts/issues/523
"""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.incident import Trigger
from finitune.core.types import Severity
from finitune.engine.case import Case
from finitune.engine.causes import _signs as signs
from finitune.engine.weight import REFUTED, Reasons, Weight

CAUSE = Code(
    "OPT404",
    Severity.ERROR,
    Text(
        "cause: the optimizer itself is wrong",
        "Given the gradients of step {step}, {optimizer} and a plain fp32 optimizer differ by a factor of "
        "{difference} at {where}; {uphill} % of its elements go against their first moment (-: not measured). The "
        "plain one stays finite.",
        "Weights, moments and gradients before the update are finite. What comes out of the update is made by the "
        "optimizer's own code.",
        (
            "optim: adamw_torch, the plain implementation",
            "another version of the optimizer's package (bitsandbytes 0.36 to 0.41.0 had a wrong 8-bit map)",
            "in a script: compare one step on random gradients with torch.optim.AdamW before training",
        ),
    ),
    Text(
        "原因：优化器本身有误",
        "对第 {step} 步的同一梯度，{optimizer} 与普通 fp32 优化器在 {where} 处相差 {difference} 倍；"
        "其中 {uphill} % 的元素朝着与一阶矩相反的方向移动（-：未测量）。普通优化器的结果有限。",
        "更新之前的权重、矩和梯度都有限。更新的结果是由优化器自身的代码造成的。",
        (
            "optim: adamw_torch，即普通实现",
            "更换优化器软件包的版本（bitsandbytes 0.36 至 0.41.0 的 8 位映射有误）",
            "在脚本中：训练之前，用随机梯度做一步，与 torch.optim.AdamW 比较",
        ),
    ),
)
CODES = (CAUSE,)
FAULT_CLASS = "R"
REMEDIES: tuple[str, ...] = ()
"""None: moments that start anew only put it off, and no condition replaces an optimizer. The run stops, with advice."""
RUINS = True
"""What goes uphill silently loses every further step as well."""


def weigh(case: Case) -> Weight | None:
    """Named where the reference optimizer stays finite from the same gradients, or the update was seen to go uphill."""
    uphill = case.bad("update_direction")
    if case.trigger in (Trigger.FORECAST, Trigger.SILENT) and not (uphill or signs.is_told(case, CAUSE.code)):
        return None
    reasons = Reasons()
    reasons.proof(case.good("reference_optimizer"), "reference_optimizer", 0.8)
    reasons.proof(uphill, "update_direction", 0.9)
    reasons.hint(case.trigger is Trigger.UPDATE and not case.has_half_weights, "trigger", 0.2)
    reasons.against(case.bad("reference_optimizer") and not uphill, "reference_optimizer", 0.1)
    reasons.against(case.good("adam_eps"), "adam_eps", REFUTED)
    reasons.against(case.has_half_weights and case.good("fp32"), "fp32", REFUTED)
    reasons.against(case.bad("scan_state"), "scan_state", 0.2)
    reasons.against(case.good("fresh_moments"), "fresh_moments", 0.6)
    reasons.against(case.good("lower_lr"), "lower_lr", 0.5)
    seen = case.number("update_direction", "parameter", "") if uphill else ""
    return reasons.weight(
        str(seen or case.number("reference_optimizer", "parameter", "") or case.finding.where),
        step=case.reading.step,
        optimizer=signs.shown(case.facts.get("optimizer")),
        difference=signs.shown(case.number("reference_optimizer", "max_rel_difference")),
        uphill=signs.shown(case.number("update_direction", "percent")),
    )
