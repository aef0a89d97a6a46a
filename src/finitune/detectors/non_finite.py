"""Non-finite: the loss or a gradient of this step is NaN or infinite.

What it sees:
    The step's loss and its gradient norm before clipping. One bad element anywhere makes the norm bad.
    Three cases: the loss itself (NUM001), only the gradient (NUM002), only the gradient while a loss
    scale is in use (NUM003).

Why it is bad:
    One update with such a gradient makes every weight NaN for good, and clipping spreads it: a norm of
    NaN turns all gradients into NaN. A non-finite gradient under a loss scale is different: it mostly
    means that the scale is too large, and the same batch is tried again at a smaller one.

Example:
    step 159: loss nan, grad_norm nan          NUM001, the step is refused
    step 150: loss 2.31, grad_norm nan         NUM002, the step is refused
    step 1:   loss 2.31, grad_norm inf, scale 65536    NUM003, tried again at 32768

What to do:
    NUM001 in fp16: the forward pass overflows; use bf16 or fp32. NUM001 everywhere: look at the rows of
    the batch, then at the weights. NUM002: an infinite derivative (sqrt or log at 0, a division) or an
    attention kernel; try attn_implementation: eager. NUM003 now and then: nothing.

Source:
    Micikevicius et al. 2018, "Mixed Precision Training", section 3.2 (loss scale and skipped steps).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from finitune.core.codes import Code, Text
from finitune.core.robust import History
from finitune.core.types import Finding, Reading, Severity

LOSS_NOT_FINITE = Code(
    "NUM001",
    Severity.ERROR,
    Text(
        "the loss is not finite",
        "The loss is {loss} at step {step} (gradient norm {grad_norm}, {num_bad} parameters with bad gradients).",
        "The forward pass made NaN or inf. An update would make every weight NaN, so the step was refused.",
        (
            "with fp16: use precision: bf16, or precision: fp32 where bf16 is missing",
            "if one batch only: look at its rows for empty answers or broken values",
            "if it lasts: go back to the last good checkpoint with a smaller learning_rate",
        ),
    ),
    Text(
        "损失不是有限值",
        "第 {step} 步的损失为 {loss}（梯度范数 {grad_norm}，{num_bad} 个参数的梯度异常）。",
        "前向计算产生了 NaN 或 inf。更新会使所有权重变成 NaN，因此该步已被拒绝。",
        (
            "使用 fp16 时：改用 precision: bf16；不支持 bf16 时用 precision: fp32",
            "若只有一批如此：检查该批数据中的空回答或异常数值",
            "若持续出现：回到最后的正常检查点，并减小 learning_rate",
        ),
    ),
)

GRADIENT_NOT_FINITE = Code(
    "NUM002",
    Severity.ERROR,
    Text(
        "a gradient is not finite",
        "The loss is {loss} but the gradient norm is {grad_norm} at step {step}: {num_bad} bad parameters ({first}).",
        "The backward pass made NaN or inf although the forward pass did not: an infinite derivative (sqrt, log or a "
        "division at 0) or a faulty kernel. The step was refused before clipping could spread it.",
        (
            "use another attention kernel: attn_implementation: eager",
            "look at the rows of this batch for empty or constant parts",
            "run the step in fp32; if it is bad there too, precision is not the cause",
        ),
    ),
    Text(
        "梯度不是有限值",
        "第 {step} 步的损失为 {loss}，但梯度范数为 {grad_norm}：{num_bad} 个参数异常（{first}）。",
        "前向正常而反向产生了 NaN 或 inf：某处导数无穷大（sqrt、log 或除法在 0 处），或算子有误。"
        "该步在梯度裁剪扩散它之前已被拒绝。",
        (
            "换用其他注意力实现：attn_implementation: eager",
            "检查该批数据中是否有空的或恒定的部分",
            "用 fp32 重算该步；若仍异常，则与精度无关",
        ),
    ),
)

SCALE_OVERFLOW = Code(
    "NUM003",
    Severity.NOTE,
    Text(
        "gradients overflowed under the loss scale",
        "The gradient norm is {grad_norm} at loss scale {loss_scale}, step {step}; the loss is {loss}.",
        "The scale was too large for this batch. This is how a dynamic scale finds its level: no weight has changed.",
        ("nothing, if it happens at the start or now and then", "if it never stops, see NUM020"),
    ),
    Text(
        "梯度在损失缩放下溢出",
        "第 {step} 步，损失缩放 {loss_scale} 时梯度范数为 {grad_norm}；损失为 {loss}。",
        "缩放对该批数据过大。动态缩放就是这样找到合适的值的：权重没有改变。",
        ("若只在开始或偶尔出现，无需处理", "若一直出现，参见 NUM020"),
    ),
)

CODES = (LOSS_NOT_FINITE, GRADIENT_NOT_FINITE, SCALE_OVERFLOW)


@dataclass(frozen=True)
class Config:
    """No settings: there is no acceptable number of non-finite updates."""


def detect(history: History, reading: Reading, config: Config) -> Finding | None:  # noqa: ARG001
    """Veto any step whose loss or gradient norm is not finite."""
    if math.isfinite(reading.loss) and math.isfinite(reading.grad_norm):
        return None
    return _code(reading).find(
        reading.bad_parameters[0] if reading.bad_parameters else "",
        veto=True,
        step=reading.step,
        loss=reading.loss,
        grad_norm=reading.grad_norm,
        loss_scale=reading.loss_scale,
        num_bad=reading.num_bad_parameters,
        first=", ".join(reading.bad_parameters) or "-",
    )


def _code(reading: Reading) -> Code:
    if not math.isfinite(reading.loss):
        return LOSS_NOT_FINITE
    return GRADIENT_NOT_FINITE if reading.loss_scale is None else SCALE_OVERFLOW
