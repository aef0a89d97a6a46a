"""Codes of the look at optimizer, schedule and number formats."""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity

HALF_TRAINED = Code(
    "OPT110",
    Severity.ERROR,
    Text(
        "trained weights are fp16, and the optimizer's eps is 0 there",
        "{count} of {total} trained tensors are fp16 (first {name}); {optimizer} divides by sqrt(v) + {eps}, and the "
        "smallest number of fp16 is 6e-8.",
        "Where a gradient is 0 or tiny, the first update is 0 / 0: the weights are NaN from step 2 on, at any learning "
        "rate, though loss and gradients were finite.",
        (
            "keep the trained weights in fp32 and compute under torch.autocast; a frozen base may stay half",
            "LoRA on a half base: cast the adapters to fp32 (autocast_adapter_dtype=True)",
            "if they must be fp16: an eps of 1e-4, or fused=True, which computes in fp32",
        ),
    ),
    Text(
        "训练的权重是 fp16，而优化器的 eps 在其中为 0",
        "{total} 个训练的张量中有 {count} 个是 fp16（第一个：{name}）；{optimizer} 除以 sqrt(v) + {eps}，"
        "而 fp16 的最小数是 6e-8。",
        "梯度为 0 或极小之处，第一次更新就是 0 / 0：无论学习率多大，权重从第 2 步起都是 NaN，尽管损失和梯度有限。",
        (
            "训练的权重保持 fp32，在 torch.autocast 下计算；冻结的底座可以是半精度",
            "半精度底座上的 LoRA：把适配器转为 fp32（autocast_adapter_dtype=True）",
            "若必须是 fp16：eps 取 1e-4，或使用以 fp32 计算的 fused=True",
        ),
    ),
)

UPDATES_LOST = Code(
    "OPT111",
    Severity.WARNING,
    Text(
        "most updates will be rounded away",
        "{count} trained tensors are {dtype}. {optimizer} changes a weight by about the learning rate, {lr}; that "
        "is enough to move {percent} % of them, for the others it is less than half of their last bit.",
        "bf16 holds 8 bits and fp16 11. An update below half of the last one disappears, every time: the loss is "
        "finite, and falls slowly or not at all.",
        (
            "keep the trained weights in fp32 and compute under torch.autocast",
            "or an optimizer with stochastic rounding or Kahan sums",
            "a higher learning rate is no cure: it only trades lost updates for coarse ones",
        ),
    ),
    Text(
        "大多数更新会被舍入掉",
        "{count} 个训练的张量是 {dtype}。{optimizer} 每步大约改变权重一个学习率（{lr}）；"
        "这只能改变其中的 {percent} %，对其余的不足最后一位的一半。",
        "bf16 只有 8 位，fp16 只有 11 位。小于最后一位一半的更新每次都会消失：损失有限，但下降缓慢或根本不降。",
        (
            "训练的权重保持 fp32，在 torch.autocast 下计算",
            "或使用带随机舍入或 Kahan 求和的优化器",
            "提高学习率不是办法：只是把丢失的更新换成粗糙的更新",
        ),
    ),
)

STATE_LOST = Code(
    "OPT113",
    Severity.WARNING,
    Text(
        "optimizer, schedule and weights are not of one run",
        "{differs}.",
        "Weights without their moments and their place in the schedule are not the state that was saved: the next "
        "updates are too large or go the wrong way. The loss hides it at first, so the state is compared.",
        (
            "save and load optimizer, scheduler, scaler, random state and data position together",
            "load the optimizer after the scheduler was built: building one sets the rates of the start",
            "if a new phase is meant to begin: build optimizer and scheduler both anew",
        ),
    ),
    Text(
        "优化器、学习率计划和权重不属于同一次训练",
        "{differs}。",
        "没有矩、也不知道计划进行到何处的权重，并不是当初保存的状态：接下来的更新会过大或方向错误。"
        "损失起初看不出来，所以比较的是状态。",
        (
            "把优化器、计划、缩放器、随机状态和数据位置一起保存和加载",
            "先构建计划再加载优化器：构建计划会把学习率设回开始时的值",
            "若要开始新的阶段：优化器和计划都重新构建",
        ),
    ),
)

CODES = (HALF_TRAINED, UPDATES_LOST, STATE_LOST)
