"""Half optimizer: trainable weights in fp16, and an optimizer whose eps vanishes there.

What it sees:
    Loss and gradients are finite, and the update makes weights or moments NaN or inf. The weights are fp16. The
    update is finite with a larger eps, or with weights and moments in fp32. That is independent of the learning rate.
    Or there is a loss scaler: it refuses to divide fp16 gradients by its scale, and no update can be made at all.

Why it is bad:
    1e-8 is 0 in fp16. Where a gradient is 0 or tiny, Adam divides 0 by 0, and the weight is NaN. Rows that no token
    used go first. The loss shows it one step later, when nothing is left to save.

Example:
    fp16 weights, AdamW, eps 1e-8: finite at step 1, NaN at step 2, at learning rates from 1e-3 to 100 alike

What to do:
    Keep trainable weights and moments in fp32 (a frozen base may be half). If they must be fp16: an eps of 1e-4.

Source:
    https://github.com/afiaka87/glide-finetune/issues/5 , https://github.com/huggingface/diffusers/pull/6119 ,
    https://github.com/cactus-compute/needle/issues/53
"""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.incident import Trigger
from finitune.core.types import Severity
from finitune.engine.case import Case
from finitune.engine.causes import _signs as signs
from finitune.engine.codes_half import HALF_UNDER_SCALER
from finitune.engine.weight import REFUTED, Reasons, Weight

CAUSE = Code(
    "OPT400",
    Severity.ERROR,
    Text(
        "cause: the optimizer computes in fp16 and its eps is lost there",
        "No finite update of {where} came of the finite gradients of step {step}. The trainable weights are {weights}, "
        "the eps is {eps}; the update is finite under: {cured_by}.",
        "The smallest step of fp16 near 0 is 6e-8, so an eps of 1e-8 is 0 and a gradient of 0 gives 0 / 0; a loss "
        "scaler refuses fp16 gradients altogether. The learning rate has no part in it.",
        (
            "precision: fp16 or precision: bf16, which keep the trainable weights and moments in fp32",
            "in a script: model.float() with torch.autocast; with LoRA on a half base, cast the adapters to fp32",
            "if the weights must be fp16: adam_epsilon: 1.0e-4",
        ),
    ),
    Text(
        "原因：优化器在 fp16 中计算，eps 因此变成 0",
        "第 {step} 步的梯度有限，{where} 却得不到有限的更新。可训练权重为 {weights}，eps 为 {eps}；"
        "在以下条件下更新有限：{cured_by}。",
        "fp16 在 0 附近的最小步长是 6e-8，因此 1e-8 的 eps 就是 0，梯度为 0 时得到 0 / 0；损失缩放器则完全拒绝 fp16 "
        "梯度。这与学习率的大小无关。",
        (
            "precision: fp16 或 precision: bf16，它们让可训练权重和矩保持 fp32",
            "在脚本中：model.float() 并使用 torch.autocast；若在半精度底座上用 LoRA，把适配器转为 fp32",
            "若权重必须是 fp16：adam_epsilon: 1.0e-4",
        ),
    ),
)
CODES = (CAUSE,)
FAULT_CLASS = "D"
REMEDIES = ("fp32_weights", "adam_eps", "bf16", "fp32")


def weigh(case: Case) -> Weight | None:
    """Named where a larger eps or another precision makes the update finite, or where a scaler refuses to make it."""
    if not case.has_half_weights or case.trigger not in (Trigger.UPDATE, *signs.FAILED):
        return None
    is_update, is_refused = case.trigger is Trigger.UPDATE, case.finding.code == HALF_UNDER_SCALER.code
    reasons = Reasons()
    reasons.proof(is_refused, "facts", 0.9)
    reasons.proof(is_update and case.good("adam_eps"), "adam_eps", 0.85)
    reasons.proof(is_update and case.good("fp32"), "fp32", 0.7)
    reasons.proof(is_update and case.good("bf16") and not case.bad("fp32"), "bf16", 0.5)
    reasons.hint(is_update, "trigger", 0.3)
    reasons.hint(is_update and case.good("reference_optimizer"), "reference_optimizer", 0.3)
    # A weight that an update spoilt some steps ago, where the state is not looked at after every one.
    reasons.hint(not is_update and _made_by_updates(case), "scan_state", 0.4)
    reasons.against(case.bad("adam_eps") and case.bad("fp32"), "adam_eps", 0.2)
    reasons.against(is_update and case.bad("scan_state"), "scan_state", REFUTED)
    reasons.against(case.good("fresh_moments") and not case.good("adam_eps"), "fresh_moments", 0.6)
    spoilt = signs.first(case, "parameter", "moment")
    return reasons.weight(
        spoilt.name if spoilt is not None else case.finding.where,
        step=case.reading.step,
        weights=signs.listed(signs.strings(case.facts.get("weights", ()))),
        eps=signs.shown(case.facts.get("adam_eps")),
        cured_by="fp32_weights" if is_refused else signs.cured_by(case, "adam_eps", "fp32", "bf16"),
    )


def _made_by_updates(case: Case) -> bool:
    """Tensors that the run writes were good, and are not now."""
    bad = signs.went_bad(case)
    return bool(bad) and all(s.kind != "buffer" and s.data.get("frozen") is not True for s in bad)
