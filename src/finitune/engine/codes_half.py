"""The code of fp16 weights that a loss scaler is to train."""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity

HALF_UNDER_SCALER = Code(
    "OPT114",
    Severity.WARNING,
    Text(
        "trainable weights are fp16, under a loss scaler",
        "{count} of {total} trainable weights are fp16, first {first}. The scaler refuses to unscale their gradients.",
        'The plain loop ends with "Attempting to unscale FP16 gradients" before its first update. fp16 values are '
        "exact in fp32, so these weights are fp32 from here on, with their moments; the frozen ones stay as they are.",
        (
            "cast the trainable weights before the optimizer is made: for p in model.parameters(): if p.requires_grad: "
            "p.data = p.data.float()",
            "with peft: get_peft_model(model, config, autocast_adapter_dtype=True)",
        ),
    ),
    Text(
        "使用损失缩放器，而可训练权重为 fp16",
        "{total} 个可训练权重中有 {count} 个为 fp16，第一个是 {first}。缩放器拒绝对其梯度做反缩放。",
        '普通循环会在第一次更新之前以 "Attempting to unscale FP16 gradients" 结束。fp16 的值在 fp32 中可精确表示，'
        "因此这些权重及其矩从此为 fp32；冻结的权重保持原样。",
        (
            "在创建优化器之前转换可训练权重：for p in model.parameters(): if p.requires_grad: p.data = p.data.float()",
            "使用 peft 时：get_peft_model(model, config, autocast_adapter_dtype=True)",
        ),
    ),
)
