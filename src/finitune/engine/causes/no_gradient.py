"""No gradient: tokens are supervised, and no gradient reaches a trainable weight.

What it sees:
    Nothing fails: the loss is finite, tokens are supervised, and the gradient is exactly 0.

Why it is bad:
    The run costs its full price and learns nothing. The usual reason is checkpointing over a frozen embedding: the
    inputs of the checkpointed part require no gradient, so it has none. A target of LoRA that is not in use does it
    too.

Example:
    LoRA with reentrant checkpointing: gradient norm 0.0, all lora_B stay 0; the loss moves by dropout only

What to do:
    use_reentrant=False for checkpointing, or enable_input_require_grads(); check what is trainable.

Source:
    https://github.com/locuslab/open-unlearning/issues/178 , https://github.com/huggingface/transformers/issues/26221
    , https://github.com/huggingface/transformers/pull/23990
"""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.incident import Trigger
from finitune.core.types import Severity
from finitune.engine.case import Case
from finitune.engine.causes import _signs as signs
from finitune.engine.weight import Reasons, Weight

CAUSE = Code(
    "MOD401",
    Severity.ERROR,
    Text(
        "cause: no gradient reaches a trainable weight",
        "The loss of step {step} is {loss} over {supervised} supervised tokens, and the gradient norm is {grad_norm}.",
        "A path from the loss to the weights is cut: checkpointing over inputs that require no gradient, a detached "
        "tensor, or trainable parts that are not in use.",
        (
            "gradient_checkpointing: false, to see whether it is the reason",
            "check lora.target_modules: the modules named there must be in use",
            "in a script: checkpoint(..., use_reentrant=False), or model.enable_input_require_grads()",
        ),
    ),
    Text(
        "原因：没有梯度到达可训练的权重",
        "第 {step} 步有 {supervised} 个受监督的 token，损失为 {loss}，而梯度范数为 {grad_norm}。",
        "从损失到权重的路径被切断：对不需要梯度的输入做了检查点重算、张量被 detach，或可训练的部分没有被用到。",
        (
            "gradient_checkpointing: false，看是否是它的原因",
            "检查 lora.target_modules：其中的模块必须被用到",
            "在脚本中：checkpoint(..., use_reentrant=False)，或 model.enable_input_require_grads()",
        ),
    ),
)
CODES = (CAUSE,)
FAULT_CLASS = "M"
REMEDIES = ()


def weigh(case: Case) -> Weight | None:
    """Named by a gradient of 0 over supervised tokens, or by the check that found it."""
    supervised = case.reading.supervised_tokens
    reasons = Reasons()
    reasons.proof(signs.is_told(case, CAUSE.code), "trigger", 0.8)
    if case.trigger is Trigger.SILENT and case.reading.grad_norm == 0.0:
        reasons.hint(supervised is None, "facts", 0.4)
        reasons.proof(supervised is not None and supervised > 0, "facts", 0.85)
    reasons.against(supervised == 0, "supervised_tokens", 0.05)
    reasons.against(case.bad("supervised_tokens"), "supervised_tokens", 0.05)
    return reasons.weight(
        case.finding.where,
        step=case.reading.step,
        loss=case.reading.loss,
        supervised=signs.shown(supervised),
        grad_norm=case.reading.grad_norm,
    )
