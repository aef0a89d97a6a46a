"""Stalled update: steps are committed but the weights do not move.

What it sees:
    Either a gradient of exactly 0 although tokens are supervised - at once where no step had another one, after
    `zero_steps` in a row where some had, or where the loss is exactly 0 as well (a policy gradient whose rewards
    are all alike has neither loss nor gradient) - or, over the last `min_measurements`
    and more measurements, fewer than `min_changed` of the sampled weight elements changed by a step while
    the learning rate is above 0.

Why it is bad:
    The run costs full price and learns nothing, and nothing looks wrong: the loss is finite and flat. In
    bf16 weights an update below 2**-8 of its weight is rounded away. A gradient of 0 means that no path
    leads from the loss to a trainable weight.

Example:
    bf16 weights, AdamW, learning rate 1e-5: 0.5 % of the elements moved in 100 steps; in fp32 all did

What to do:
    precision: bf16 instead of bf16-pure. With checkpointing and a frozen base: make the inputs require
    gradients (use_reentrant: false does). With LoRA: check that the targets are in use.

Source:
    Zamirai et al. 2021, "Revisiting BFloat16 Training", section 2 (nearest rounding cancels updates).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from finitune.core.codes import Code, Text
from finitune.core.robust import History
from finitune.core.types import Finding, Reading, Severity
from finitune.detectors._checks import above, at_least

STALLED_UPDATE = Code(
    "OPT001",
    Severity.WARNING,
    Text(
        "the weights do not move",
        "Step {step}: {percent} % of the weights changed lately, gradient norm {grad_norm}, learning rate {lr}.",
        "Either the updates are too small for the weights' number format and are rounded away, or no gradient "
        "reaches a trainable weight. The run learns nothing and looks healthy.",
        (
            "with precision: bf16-pure use precision: bf16 (fp32 weights)",
            "if the gradient norm is 0: check what is trainable (lora.targets, freeze) and use_reentrant: false",
            "if the learning rate is tiny: check warm-up and schedule",
        ),
    ),
    Text(
        "权重没有变化",
        "第 {step} 步：最近只有 {percent} % 的权重有变化，梯度范数 {grad_norm}，学习率 {lr}。",
        "要么更新相对于权重的数值格式太小而被舍掉，要么没有梯度到达可训练权重。训练什么也学不到，看起来却正常。",
        (
            "若使用 precision: bf16-pure，改用 precision: bf16（权重为 fp32）",
            "若梯度范数为 0：检查可训练部分（lora.targets、freeze），并设置 use_reentrant: false",
            "若学习率极小：检查预热和学习率计划",
        ),
    ),
)

CODES = (STALLED_UPDATE,)


@dataclass(frozen=True)
class Config:
    """Limits of a stall."""

    min_changed: float = 0.01
    """Share (0..1) of the sampled elements that a step should change."""
    min_measurements: int = 4
    """Measurements of that share before it is judged; all of them must be too small."""
    zero_steps: int = 16
    """Steps in a row with a gradient of exactly 0, in a run that has had another one."""

    def __post_init__(self) -> None:
        above("min_changed", self.min_changed, 0.0)
        if self.min_changed > 1.0:
            raise ValueError(f"min_changed = {self.min_changed}: a share is at most 1")
        at_least("min_measurements", self.min_measurements, 1)
        at_least("zero_steps", self.zero_steps, 1)


def detect(history: History, reading: Reading, config: Config) -> Finding | None:
    """A warning, never a veto: a step that moves nothing harms nothing."""
    if not (math.isfinite(reading.loss) and math.isfinite(reading.grad_norm)):
        return None
    if not (_no_gradient(history, reading, config) or _unmoved(history, reading, config)):
        return None
    return STALLED_UPDATE.find(
        step=reading.step, percent=100.0 * history.changed_fraction.median(), grad_norm=reading.grad_norm, lr=reading.lr
    )


def _no_gradient(history: History, reading: Reading, config: Config) -> bool:
    if reading.grad_norm != 0.0 or not reading.supervised_tokens:
        return False
    never = len(history.log_grad_norm) == 0 and reading.loss != 0.0
    return never or history.zero_gradients_in_a_row + 1 >= config.zero_steps


def _unmoved(history: History, reading: Reading, config: Config) -> bool:
    measured = list(history.changed_fraction)
    if reading.changed_fraction is not None and math.isfinite(reading.changed_fraction):
        measured.append(reading.changed_fraction)
    enough = len(measured) >= config.min_measurements
    return reading.lr > 0 and enough and max(measured) < config.min_changed
