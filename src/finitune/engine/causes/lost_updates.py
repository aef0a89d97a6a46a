"""Lost updates: the weights are in bf16, and the updates are too small for it and are rounded away.

What it sees:
    Nothing fails. Weights are in half precision, gradients and learning rate are not 0, and yet hardly a weight
    changes in a step.

Why it is bad:
    bf16 keeps 8 bits: an update below 1/256 of its weight is lost, every time. The loss falls slowly or not at all,
    and a higher rate, the usual advice, trades that for noise in the large updates.

Example:
    bf16 weights, AdamW, rate 1e-5, 100 steps: 0.5 % of the weights moved; with fp32 weights all of them

What to do:
    precision: bf16, which computes in bf16 and keeps the weights in fp32.

Source:
    https://github.com/meta-pytorch/torchtune/issues/2254 , https://github.com/pytorch/ao/pull/1124 ,
    https://github.com/Nerogar/OneTrainer/issues/996 ; Zamirai et al. 2021, "Revisiting BFloat16 Training", section 2
"""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.incident import Trigger
from finitune.core.types import Severity
from finitune.engine.case import Case
from finitune.engine.causes import _signs as signs
from finitune.engine.weight import Reasons, Weight

# Fewer weights than this change: the limit of the detector that reports a stalled update.
_FEW = 0.05

CAUSE = Code(
    "OPT402",
    Severity.WARNING,
    Text(
        "cause: updates are rounded away",
        "A step changes {changed} of the weights; they are kept in {weights}, the learning rate is {lr}.",
        "bf16 and fp16 weights hold 8 or 11 bits. An update smaller than the last of them disappears, so most "
        "weights never "
        "move.",
        (
            "precision: bf16 (computes in bf16, keeps the weights in fp32) instead of bf16-pure",
            "with LoRA: keep the adapters in fp32; the base may be half",
            "in a script: model.float() and torch.autocast, or an optimizer with stochastic rounding or Kahan sums",
        ),
    ),
    Text(
        "原因：更新被舍入掉了",
        "每一步只改变 {changed} 的权重；权重以 {weights} 保存，学习率为 {lr}。",
        "bf16 和 fp16 的权重只有 8 位或 11 位有效位。小于最后一位的更新会消失，因此大多数权重从不变化。",
        (
            "用 precision: bf16（以 bf16 计算，权重保持 fp32）代替 bf16-pure",
            "使用 LoRA 时：适配器保持 fp32，底座可以是半精度",
            "在脚本中：model.float() 加 torch.autocast，或使用带随机舍入或 Kahan 求和的优化器",
        ),
    ),
)
CODES = (CAUSE,)
FAULT_CLASS = "J"
REMEDIES = ("fp32",)


def weigh(case: Case) -> Weight | None:
    """Named by the count of weights that changed."""
    weights = signs.strings(case.facts.get("weights", ()))
    half = any(w in ("bfloat16", "float16") for w in weights)
    if case.trigger is not Trigger.SILENT or not half:
        return None
    changed = signs.number(case.reading.changed_fraction)
    norm, rate = signs.number(case.reading.grad_norm), signs.number(case.reading.lr)
    moving = norm is not None and norm > 0 and rate is not None and rate > 0
    reasons = Reasons()
    reasons.hint(True, "facts", 0.3)
    reasons.proof(moving and changed is not None and changed < _FEW, "facts", 0.7)
    reasons.against(norm == 0.0 or rate == 0.0, "facts", 0.1)
    reasons.against(changed is not None and changed >= _FEW, "facts", 0.1)
    return reasons.weight(
        changed="-" if changed is None else f"{changed:.2%}",
        weights=signs.listed(weights),
        lr=signs.shown(rate),
    )
