"""Codes of the looks at what an update and a loss mean, while a run is healthy."""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity

UPHILL = Code(
    "OPT120",
    Severity.ERROR,
    Text(
        "the update goes uphill",
        "In step {step} {percent} % of {num} elements of {where} ({what}) were moved the wrong way, as in the "
        "{looks} updates up to it; {count} parameters in all.",
        "An optimizer of this kind moves every element against its first moment, and the moment towards the gradient, "
        "whatever rate, clipping and decay are. Where nearly all elements go the other way, a sign is wrong in the "
        "optimizer's code. The loss then falls more slowly or rises, and every number looks healthy.",
        (
            "another implementation of the optimizer: torch.optim.AdamW, optim: adamw_torch",
            "look at what is special about these parameters: a group of their own, a fused kernel, maximize=True",
            "go back to a checkpoint from before the optimizer was changed",
        ),
    ),
    Text(
        "更新朝着上坡方向",
        "第 {step} 步中，{where}（{what}）的 {num} 个元素有 {percent} % 朝着错误的方向移动，"
        "已连续 {looks} 次更新如此；共有 {count} 个参数。",
        "这类优化器总是让每个元素逆着一阶矩移动，让一阶矩朝着梯度移动，与学习率、裁剪和权重衰减无关。"
        "几乎所有元素都反向移动，说明优化器代码中有符号错误。此时损失下降变慢或上升，而所有数值看起来都正常。",
        (
            "换用优化器的另一种实现：torch.optim.AdamW，optim: adamw_torch",
            "查看这些参数有何特别之处：单独的参数组、融合算子、maximize=True",
            "回到更换优化器之前的检查点",
        ),
    ),
)

LOSS_RESCALED = Code(
    "OPT121",
    Severity.WARNING,
    Text(
        "the loss is computed in another way than before",
        "Step {past_step}, computed again on the weights that it was made on, has the loss {now}, and had {was} when "
        "it was made: {factor} times, with {micros} micro-batches a step. It shows since step {since}.",
        "Neither the weights nor the data changed the loss: its formula did. A sum over micro-batches in the place of "
        "their mean (or the other way round) multiplies the gradient as well. Clipping and Adam hide most of it; with "
        "SGD the learning rate is as many times larger, and logged losses are not comparable.",
        (
            "divide the loss of each micro-batch by their number once: in the trainer or in the model, not in both",
            "with a trainer that passes num_items_in_batch: the loss is the sum over tokens divided by it",
            "look at what changed at step {since}: a schedule in loss_fn, a callback, a reloaded module",
        ),
    ),
    Text(
        "损失的计算方式与先前不同",
        "第 {past_step} 步在当时的权重上重新计算，损失为 {now}，而当时为 {was}：相差 {factor} 倍，"
        "每步有 {micros} 个微批次。自第 {since} 步起出现。",
        "改变损失的既不是权重也不是数据，而是计算公式。对微批次求和代替求平均（或相反）也会使梯度乘上同样的倍数。"
        "裁剪和 Adam 掩盖了大部分影响；用 SGD 时等于学习率放大同样倍数，记录的损失也不再可比。",
        (
            "每个微批次的损失只除以一次微批次数：在训练器或模型中，不要两处都除",
            "若训练器传入 num_items_in_batch：损失是词元损失之和除以它",
            "查看第 {since} 步发生了什么变化：loss_fn 中的调度、回调、重新加载的模块",
        ),
    ),
)

CODES = (UPHILL, LOSS_RESCALED)
