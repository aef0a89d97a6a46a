"""Backward overflow: the loss is finite, and the scaled gradients leave the range of fp16.

What it sees:
    A finite loss with a gradient that is not, in a run that computes in fp16. It is this cause where the gradient is
    finite at a smaller loss scale (range), or in fp32 or bf16. A gradient that is NaN at every scale and in every
    precision has another origin, and a scaler would only hide it.

Why it is bad:
    A few overflows at the start are how a dynamic scale finds its level, and are no incident. If no scale is left,
    every step is skipped; the scale of a common scaler then falls towards 0 and training silently stops.

Example:
    scale 65536: gradient norm inf; scale 256: 3.1; scale 1: 3.1; the loss is 2.31 at each of them

What to do:
    Where all gradients are large: a smaller scale, and a smaller floor of it. Where one module is loud, at a scale that
    suits the others: that module in fp32, for at a scale that suits it the others round to 0. Or precision: bf16, which
    needs no scale. A fixed scale chosen by hand is no cure: it is too large for one batch and too small for the next.
    Batches that a scaler skips on its way down are lost to a common loop; after the cure they are trained on.

Source:
    https://github.com/unslothai/unsloth-zoo/pull/866 , https://github.com/deepspeedai/DeepSpeed/issues/931 ,
    https://github.com/pytorch/pytorch/issues/55585 ; Micikevicius et al. 2018, "Mixed Precision Training", section
    3.2
"""

from __future__ import annotations

import math

from finitune.core.codes import Code, Text
from finitune.core.incident import Trigger
from finitune.core.types import Severity
from finitune.engine.case import Case
from finitune.engine.causes import _signs as signs
from finitune.engine.weight import REFUTED, Reasons, Weight

CAUSE = Code(
    "NUM401",
    Severity.ERROR,
    Text(
        "cause: the gradients overflow in fp16",
        "The loss is {loss}, but the gradient norm is {grad_norm} at loss scale {loss_scale} (first at {where}). It "
        "is "
        "finite at scales {good_at}, not at {bad_at}; another precision that cures it: {cured_by}.",
        "Scaled gradients must fit below 65504. Where no scale is left at which they do, every step is skipped and "
        "the "
        "run stands still, with finite weights and nothing to see in the loss.",
        (
            "precision: bf16: the range of fp32, and no loss scale is needed",
            "scaler.min_scale: {floor} lets the scale fall far enough",
            "where one module alone is loud: keep that module in fp32",
            "in a script: use torch.amp.GradScaler and look at its scale in every step; it has no floor of its own",
        ),
    ),
    Text(
        "原因：梯度在 fp16 中溢出",
        "损失为 {loss}，但损失缩放为 {loss_scale} 时梯度范数为 {grad_norm}（最先出现在 {where}）。缩放为 {good_at} "
        "时有限，"
        "为 {bad_at} 时不有限；能治好它的其他精度：{cured_by}。",
        "缩放后的梯度必须小于 65504。若没有任何缩放能做到，每一步都会被跳过，训练停滞不前，而权重有限，"
        "损失也看不出异常。",
        (
            "precision: bf16：范围同 fp32，且不需要损失缩放",
            "scaler.min_scale: {floor} 使缩放可以降得足够低",
            "若只有一个模块过大：让该模块保持 fp32",
            "在脚本中：使用 torch.amp.GradScaler，并在每一步查看它的缩放值；它本身没有下限",
        ),
    ),
)
CODES = (CAUSE,)
FAULT_CLASS = "C"
REMEDIES = ("scaler_reset", "fp32_modules", "bf16", "fp32")


def weigh(case: Case) -> Weight | None:
    """Named where a smaller scale or another precision makes the gradients finite."""
    if not signs.is_half(case) or case.trigger not in (Trigger.GRADIENT, Trigger.SCALE):
        return None
    if not math.isfinite(case.reading.loss):
        return None
    reasons = Reasons()
    reasons.proof(case.good("loss_scales"), "loss_scales", 0.9)
    reasons.proof(case.good("fp32"), "fp32", 0.6)
    reasons.proof(case.good("bf16") and not case.bad("fp32"), "bf16", 0.5)
    reasons.hint(case.trigger is Trigger.SCALE, "trigger", 0.15)
    reasons.hint(case.good("islands"), "islands", 0.3)
    # Not finite at any scale, 1 among them: not the scale is at fault. Only a range that fp32 cures is left.
    reasons.against(case.bad("loss_scales"), "loss_scales", 0.7 if case.good("fp32") else 0.2)
    reasons.against(case.bad("fp32"), "fp32", 0.15)
    reasons.against(case.good("math_attention"), "math_attention", 0.5)
    reasons.against(case.bad("scan_state"), "scan_state", REFUTED)
    good_at = case.number("loss_scales", "good_at", ())
    return reasons.weight(
        signs.spot(case) or signs.listed(case.reading.bad_parameters, 1).removesuffix("-"),
        loss=case.reading.loss,
        grad_norm=case.reading.grad_norm,
        loss_scale=signs.shown(case.reading.loss_scale),
        good_at=_numbers(good_at),
        bad_at=_numbers(case.number("loss_scales", "bad_at", ())),
        cured_by=signs.cured_by(case, "bf16", "fp32"),
        floor=_floor(case, good_at),
    )


def _numbers(values: object) -> str:
    found = [n for v in values if (n := signs.number(v)) is not None] if isinstance(values, list | tuple) else []
    return ", ".join(f"{n:g}" for n in found) or "-"


def _floor(case: Case, good_at: object) -> float:
    """The largest scale that was good and loses nothing, as far as it is below the usual floor."""
    usual = 2.0**-4
    if case.number("loss_scales", "suits", True) is False or case.good("islands"):
        return usual
    values = good_at if isinstance(good_at, list | tuple) else ()
    found = [n for v in values if (n := signs.number(v)) is not None and n > 0]
    return min(usual, signs.number(case.number("loss_scales", "scale")) or max(found, default=usual))
