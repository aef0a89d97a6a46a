"""Exploding gradient: a few steps with a gradient far beyond the others carry the run away; a tighter clip holds it.

What it sees:
    From a state some steps back, over the same batches and at the same learning rate: with the gradient clipped to
    half of its usual norm the loss stays near that of before, as the run went it does not.

Why it is bad:
    One huge gradient moves every weight by as much as hundreds of ordinary ones, and momentum repeats it. With SGD
    the next gradient is larger still. (Adam divides by the gradient's own size: there clipping rarely helps, and is
    only named where it did.)

Example:
    gradient norms 1.1, 0.9, 48, 2e4, inf; clipped to 0.5 from 8 steps back: the loss stays at 2.4

What to do:
    max_grad_norm at the value that was proved. The learning rate needs no change.

Source:
    Pascanu et al. 2013, "On the difficulty of training recurrent neural networks", section 3.2;
    https://github.com/haotian-liu/LLaVA/issues/1301
"""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.incident import Trigger
from finitune.core.types import Severity
from finitune.engine.case import Case
from finitune.engine.causes import _signs as signs
from finitune.engine.weight import REFUTED, Reasons, Weight

CAUSE = Code(
    "OPT406",
    Severity.ERROR,
    Text(
        "cause: the gradient explodes",
        "The gradient norm is {grad_norm} at step {step}; it is {median_grad_norm} as a rule. Clipped to "
        "{max_grad_norm} "
        "from step {start_step} on, over the same batches and at the same rate, the loss ends at {clipped_loss}.",
        "A gradient far beyond the usual moves the weights so far that the next one is larger still. Clipping bounds "
        "the "
        "step and keeps its direction.",
        (
            "max_grad_norm: {max_grad_norm}",
            "in a script: torch.nn.utils.clip_grad_norm_(parameters, {max_grad_norm}), after a test that the norm is "
            "finite: clipping by a norm of NaN makes every gradient NaN",
        ),
    ),
    Text(
        "原因：梯度爆炸",
        "第 {step} 步的梯度范数为 {grad_norm}，通常为 {median_grad_norm}。从第 {start_step} 步起把它裁剪到 "
        "{max_grad_norm}，"
        "数据和学习率不变，损失最终为 {clipped_loss}。",
        "远超平常的梯度把权重推得太远，使下一个梯度更大。裁剪限制步长而保持方向。",
        (
            "max_grad_norm: {max_grad_norm}",
            "在脚本中：torch.nn.utils.clip_grad_norm_(parameters, {max_grad_norm})，并先检查范数是否有限："
            "用 NaN 的范数裁剪会使所有梯度变成 NaN",
        ),
    ),
)
CODES = (CAUSE,)
FAULT_CLASS = "I"
REMEDIES = ("clip", "adaptive_clip", "lower_lr")


def weigh(case: Case) -> Weight | None:
    """Named where a tighter clip cured; suspected where a gradient norm is what stands out."""
    reasons = Reasons()
    stands_out = case.trigger is Trigger.OUTLIER and "grad_norm" in case.finding.data
    reasons.proof(case.good("tighter_clip"), "tighter_clip", 0.8)
    reasons.hint(stands_out, "trigger", 0.25)
    reasons.hint(case.good("tighter_clip") and case.bad("lower_lr"), "lower_lr", 0.4)
    reasons.against(case.bad("tighter_clip"), "tighter_clip", 0.1)
    reasons.against(signs.is_half(case) and signs.precision_cures(case), signs.cured_by(case, "fp32", "bf16"), REFUTED)
    reasons.against(case.good("adam_eps"), "adam_eps", REFUTED)
    reasons.against(case.bad("scan_state"), "scan_state", REFUTED)
    reasons.against(case.good("rows"), "rows", 0.6)
    reasons.against(case.good("let_pass"), "let_pass", 0.3)
    losses = case.number("tighter_clip", "losses")
    return reasons.weight(
        step=case.reading.step,
        grad_norm=case.reading.grad_norm,
        median_grad_norm=signs.shown(case.past.get("median_grad_norm")),
        max_grad_norm=signs.shown(case.number("tighter_clip", "max_grad_norm", case.past.get("median_grad_norm"))),
        start_step=signs.shown(case.number("tighter_clip", "start_step")),
        clipped_loss=losses[-1] if isinstance(losses, list | tuple) and losses else "-",
    )
