"""Loss normalisation: accumulation or packing changes the scale of the loss.

What it sees:
    A check computed one step in two ways (one large micro-batch, several small ones; packed and not packed) and the
    gradients differ by a factor or a direction. It is the check that names it: no step of such a run fails.
    Or a step of the past, computed again on the weights and the batch it was made on, has a loss and a gradient that
    are larger (or smaller) than its own by the number of micro-batches: the formula changed, not the data.

Why it is bad:
    A mean of means weighs short answers like long ones; a factor of the number of micro-batches changes the effective
    learning rate. Runs are no longer comparable, and nothing is NaN.

Example:
    1 and 11 supervised tokens in two micro-batches: gradient norms differ by 1.30, cosine 0.71.
    4 micro-batches, losses around 2.1 and from step 28 on around 8.4; step 20, computed again: 8.52, it was 2.13

What to do:
    Sum the loss over tokens and divide by the count of the whole step. With packing: positions and mask per document.

Source:
    https://github.com/huggingface/transformers/pull/35438 , https://github.com/huggingface/transformers/issues/37766
    , https://github.com/hiyouga/LlamaFactory/pull/7318
"""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity
from finitune.engine.case import Case
from finitune.engine.causes import _signs as signs
from finitune.engine.weight import Reasons, Weight

CAUSE = Code(
    "OPT403",
    Severity.ERROR,
    Text(
        "cause: the loss depends on how the batch is cut",
        "The same rows give a loss or gradients that differ by a factor of {ratio} (cosine {cosine}), in {micros} "
        "micro-batches: it hangs on how they are cut or packed, or on who divides by their number.",
        "A mean of means weighs short answers like long ones; a sum over micro-batches multiplies the gradient by "
        "their number. The loss of a step must be the sum over its supervised tokens, divided once by their number.",
        (
            "FiniTune's own loop sums over tokens; a run of it needs nothing",
            "in a script: reduction='sum' per micro-batch, divided by the supervised tokens of the whole step",
            "with packing: position ids that restart and a mask per document",
        ),
    ),
    Text(
        "原因：损失取决于批次的切分方式",
        "同样的数据行（{micros} 个微批次），损失或梯度相差 {ratio} 倍（余弦 {cosine}）："
        "它取决于如何切分或打包，或由谁除以微批次数。",
        "平均值的平均会让短答案与长答案同等重要；对微批次求和会使梯度放大微批次数倍。"
        "一步的损失必须是其受监督 token 之和，再除以一次总数。",
        (
            "FiniTune 自己的循环按 token 求和，无需处理",
            "在脚本中：每个微批次用 reduction='sum'，再除以整步受监督的 token 数",
            "使用打包时：每个文档的位置编号重新开始，并使用各自的掩码",
        ),
    ),
)
CODES = (CAUSE,)
FAULT_CLASS = "L"
REMEDIES = ()
RUINS = False
"""Clipping and Adam take the factor away again: the run is told of it, and goes on."""


def weigh(case: Case) -> Weight | None:
    """Named by the check that found it, or by a step of the past whose loss has changed by the number of micros."""
    changed = case.bad("past_loss") and bool(case.number("past_loss", "by_micros"))
    reasons = Reasons()
    reasons.proof(signs.is_told(case, CAUSE.code), "trigger", 0.9)
    reasons.proof(changed, "past_loss", 0.95)
    data = case.finding.data
    ratio = case.number("past_loss", "factor") if changed else data.get("ratio")
    return reasons.weight(
        "loss_fn" if changed else case.finding.where,
        ratio=signs.shown(ratio),
        cosine=signs.shown(data.get("cosine")),
        micros=signs.shown(case.number("past_loss", "micros", data.get("micros"))),
    )
