"""Wrong precision: the step computes in another number format than the one that was asked for.

What it sees:
    The run is set to fp32, and the first bad operation computed in fp16 (an autocast inside of the model or of the
    loss); or a check found that nothing ran in the format that was asked for.

Why it is bad:
    An autocast for another device type is silently without effect, and one inside of a model is not seen from
    outside. The failure then looks impossible ("it cannot overflow, it is fp32").

Example:
    precision fp32; layers.4.mlp.down_proj puts out float16, inf

What to do:
    One place that sets the precision; autocast with the device type of the tensors; no autocast inside of the model.

Source:
    https://github.com/Stability-AI/stable-audio-3/pull/68 , https://github.com/ace-step/ACE-Step-1.5/issues/619 ,
    https://github.com/ROCm/TheRock/issues/2662
"""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity
from finitune.engine.case import Case
from finitune.engine.causes import _signs as signs
from finitune.engine.weight import Reasons, Weight

CAUSE = Code(
    "SYS402",
    Severity.ERROR,
    Text(
        "cause: the step computes in another format than asked for",
        "The run is set to {precision} on {device}, but {where} computes in {dtype}.",
        "An autocast inside of the model or of the loss changes the format unseen, and one for another device type "
        "does "
        "nothing at all.",
        (
            "set the format in one place: precision: bf16 or precision: fp32",
            "in a script: torch.autocast(device_type=x.device.type, dtype=...), and none inside of the model",
            "print the dtype of the output of {where}",
        ),
    ),
    Text(
        "原因：该步使用的数值格式与要求不同",
        "设备 {device} 上的训练设定为 {precision}，但 {where} 以 {dtype} 计算。",
        "模型或损失内部的 autocast 会悄悄改变格式，而针对其他设备类型的 autocast 则完全不起作用。",
        (
            "只在一处设定格式：precision: bf16 或 precision: fp32",
            "在脚本中：torch.autocast(device_type=x.device.type, dtype=...)，模型内部不要再用",
            "打印 {where} 输出的 dtype",
        ),
    ),
)
CODES = (CAUSE,)
FAULT_CLASS = "S"
REMEDIES = ("fp32_modules", "bf16", "fp32")


def weigh(case: Case) -> Weight | None:
    """Named where fp32 cures a run that is set to fp32, or where a check saw it."""
    precision = str(case.facts.get("precision", ""))
    dtype = str(signs.of(signs.first(case, "op", "module"), "dtype") or "")
    unasked = precision == "fp32" and not case.has_half_weights and "float16" in dtype
    reasons = Reasons()
    reasons.proof(signs.is_told(case, CAUSE.code), "trigger", 0.8)
    reasons.hint(unasked, "localised", 0.4)
    reasons.proof(unasked and case.good("fp32"), "fp32", 0.6)
    reasons.proof(unasked and case.good("islands"), "islands", 0.5)
    reasons.against(case.bad("fp32"), "fp32", 0.5)
    reasons.against(case.bad("scan_state"), "scan_state", 0.4)
    return reasons.weight(
        signs.spot(case) or case.finding.where,
        precision=signs.shown(precision),
        dtype=signs.shown(dtype),
        device=signs.shown(case.facts.get("device")),
    )
