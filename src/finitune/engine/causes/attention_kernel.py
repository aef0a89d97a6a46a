"""Attention kernel: a fused kernel is wrong for this shape, where the plain one is right.

What it sees:
    The plain (math, eager) attention makes the failure go away, or another padding width does while the failure sits
    in attention. Typically the loss is finite and a gradient is NaN: a fault of the backward kernel only.

Why it is bad:
    It hangs on length, head size and device, so it comes and goes with the batch, and the data of that batch is
    blamed. One update with such a gradient makes every weight NaN.

Example:
    length 192 (L % 128 == 64): loss 4.18, gradient of q_proj NaN; at length 193, or with eager attention, finite

What to do:
    attn_implementation: eager, until the kernel's package is updated. Where the kernel is your own: pad to lengths
    that it takes, and compare its gradient with the plain one.

Source:
    https://github.com/pytorch/pytorch/issues/196678 , https://github.com/NVIDIA-NeMo/Automodel/pull/2687 ,
    https://github.com/hiyouga/LlamaFactory/issues/9631
"""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity
from finitune.engine.case import Case
from finitune.engine.causes import _signs as signs
from finitune.engine.weight import REFUTED, Reasons, Weight

CAUSE = Code(
    "NUM403",
    Severity.ERROR,
    Text(
        "cause: the attention kernel is wrong for this shape",
        "{where} ({op}, {phase} pass) fails with attention {attention} at width {width}. It is fine under: "
        "{cured_by}; "
        "changes of the padding that cure: {widths_good}, that do not: {widths_bad}.",
        "A fused kernel takes short cuts that depend on length, head size and device. The plain attention computes "
        "the "
        "same numbers without them.",
        (
            "model.attn_implementation: eager",
            "in a script: torch.backends.cuda.enable_cudnn_sdp(False), or sdpa_kernel(SDPBackend.MATH)",
            "a kernel of your own: compare its gradient with plain attention at width {width}",
        ),
    ),
    Text(
        "原因：注意力算子对该形状出错",
        "{where}（{op}，{phase}）在注意力为 {attention}、宽度为 {width} 时失败。在以下条件下正常：{cured_by}；"
        "能治好的填充变化：{widths_good}，无效的：{widths_bad}。",
        "融合算子采用依赖于长度、头大小和设备的捷径。普通注意力不走捷径，算出同样的数值。",
        (
            "model.attn_implementation: eager",
            "在脚本中：torch.backends.cuda.enable_cudnn_sdp(False)，或 sdpa_kernel(SDPBackend.MATH)",
            "若是自己写的算子：在宽度 {width} 处将其梯度与普通注意力比较",
        ),
    ),
)
CODES = (CAUSE,)
FAULT_CLASS = "F"
REMEDIES = ("math_attention", "skip_rows", "drop_batch")


def weigh(case: Case) -> Weight | None:
    """Named where the plain attention cures, another width does while the failure sits in attention, or the backward
    pass of attention makes a bad gradient of clean numbers.
    """
    if case.trigger not in signs.FAILED:
        return None
    backward = signs.phase(case) == "backward"
    inside = signs.in_attention(case)
    reasons = Reasons()
    reasons.proof(case.good("math_attention"), "math_attention", 0.85)
    reasons.proof(case.good("padding") and (inside or backward), "padding", 0.7 if inside else 0.4)
    reasons.hint(backward and inside, "localised", 0.3)
    broken = inside and signs.breaks_backward(case)
    reasons.proof(broken, "localised", 0.6)
    still_bad = 0.6 if case.good("padding") or broken else 0.2
    reasons.against(case.bad("math_attention"), "math_attention", still_bad)
    reasons.against(not backward and signs.is_softmax(case) and case.good("rows"), "rows", 0.7)
    reasons.against(case.good("rows") and not (broken or case.good("padding", "math_attention")), "rows", 0.7)
    reasons.against(case.good("loss_scales"), "loss_scales", 0.5)
    reasons.against(case.good("lower_lr"), "lower_lr", REFUTED)
    reasons.against(case.good("tighter_clip"), "tighter_clip", REFUTED)
    reasons.against(case.bad("scan_state"), "scan_state", 0.2)
    return reasons.weight(
        signs.spot(case),
        op=signs.op(case) or "-",
        phase=signs.phase(case),
        attention=signs.shown(case.facts.get("attention")),
        width=signs.shown(case.facts.get("width_tokens")),
        cured_by=signs.cured_by(case, "math_attention", "padding"),
        widths_good=signs.listed(map(str, signs.steps(case.number("padding", "widths_good", ())))),
        widths_bad=signs.listed(map(str, signs.steps(case.number("padding", "widths_bad", ())))),
    )
