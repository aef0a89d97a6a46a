"""Loss normalisation: accumulation or packing changes the scale of the loss.

What it sees:
    A check computed one step in two ways (one large micro-batch, several small ones; packed and not packed) and the
    gradients differ by a factor or a direction. It is the check that names it: no step of such a run fails.

Why it is bad:
    A mean of means weighs short answers like long ones; a factor of the number of micro-batches changes the effective
    learning rate. Runs are no longer comparable, and nothing is NaN.

Example:
    1 and 11 supervised tokens in two micro-batches: gradient norms differ by 1.30, cosine 0.71

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
        "The same rows give gradients that differ by a factor of {ratio} (cosine {cosine}) when they are cut into "
        "other "
        "micro-batches or packs.",
        "A mean of means weighs short answers like long ones. The loss of a step must be the sum over its supervised "
        "tokens, divided once by their number.",
        (
            "FiniTune's own loop sums over tokens; a run of it needs nothing",
            "in a script: reduction='sum' per micro-batch, divided by the supervised tokens of the whole step",
            "with packing: position ids that restart and a mask per document",
        ),
    ),
    Text(
        "原因：损失取决于批次的切分方式",
        "同样的数据行换一种微批次或打包方式，梯度相差 {ratio} 倍（余弦 {cosine}）。",
        "平均值的平均会让短答案与长答案同等重要。一步的损失必须是其受监督 token 之和，再除以一次总数。",
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


def weigh(case: Case) -> Weight | None:
    """Named by the check that found it."""
    reasons = Reasons()
    reasons.proof(signs.is_told(case, CAUSE.code), "trigger", 0.9)
    data = case.finding.data
    return reasons.weight(
        case.finding.where, ratio=signs.shown(data.get("ratio")), cosine=signs.shown(data.get("cosine"))
    )
