"""Scaler collapse: the loss scale falls and falls, because the gradients overflow at any scale.

What it sees:
    A loss scale below `floor`, or `max_overflows_in_a_row` overflows without one committed step that have brought it
    down to `searched_scale`, or `endless_overflows` at any scale: a search that begins at 2**32 takes 16 overflows to
    come down to 65536. A scale of exactly 1 is how many logs write "no scaling" and is not judged.

Why it is bad:
    A scale exists to lift small gradients; below 1 it presses them down. Overflow that a smaller scale
    does not cure comes from the forward pass or from huge gradients: fp16 has no room for this model.
    Meanwhile nothing is learned, the weights look healthy, and a scaler without a floor reaches 0 after
    about 166 halvings; the next good batch then divides by it and the weights are NaN.

Example:
    scale 65536, 32768, ... 0.5 in 17 steps, loss finite, no step committed since

What to do:
    Do not wait. precision: bf16, or fp32 where the device lacks bf16. A smaller learning rate helps only
    where the overflow began late in the run.

Source:
    torch.amp.GradScaler (backoff factor 0.5, no floor): 2**16 * 0.5**166 is below the smallest fp32
    subnormal, 2**-149.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from finitune.core.codes import Code, Text
from finitune.core.robust import History
from finitune.core.types import Finding, Reading, Severity
from finitune.detectors._checks import above, at_least

SCALER_COLLAPSE = Code(
    "NUM020",
    Severity.WARNING,
    Text(
        "the loss scale collapsed",
        "The loss scale is {loss_scale} at step {step}, after {overflows} overflows in a row (loss {loss}).",
        "No scale is small enough: fp16 has no room for what this model computes. Nothing is learned meanwhile, "
        "although loss and weights may look healthy.",
        (
            "use precision: bf16",
            "where the device has no bf16: precision: fp32",
            "if it began late in the run: go back to a checkpoint before it with a smaller learning_rate",
        ),
    ),
    Text(
        "损失缩放崩溃",
        "第 {step} 步的损失缩放为 {loss_scale}，已连续溢出 {overflows} 次（损失 {loss}）。",
        "无论多小的缩放都不够：fp16 容不下该模型的计算。此时什么也学不到，尽管损失和权重看起来可能正常。",
        (
            "使用 precision: bf16",
            "设备不支持 bf16 时：precision: fp32",
            "若在训练后期才出现：回到之前的检查点，并减小 learning_rate",
        ),
    ),
)

CODES = (SCALER_COLLAPSE,)


@dataclass(frozen=True)
class Config:
    """Limits of a collapse."""

    floor: float = 1.0
    """A scale below this one has collapsed."""
    max_overflows_in_a_row: int = 16
    """This many overflows without a committed step are a collapse at a small scale: 65536 has become 1."""
    searched_scale: float = 64.0
    """Down to this scale a search may take longer than that."""
    endless_overflows: int = 40
    """This many overflows without a committed step are a collapse at any scale."""

    def __post_init__(self) -> None:
        above("floor", self.floor, 0.0)
        at_least("max_overflows_in_a_row", self.max_overflows_in_a_row, 1)
        above("searched_scale", self.searched_scale, 0.0)
        at_least("endless_overflows", self.endless_overflows, 1)


def detect(history: History, reading: Reading, config: Config) -> Finding | None:
    """A warning, never a veto: what overflowed is refused by ``non_finite`` already."""
    if reading.loss_scale is None:
        return None
    overflowed = math.isfinite(reading.loss) and not math.isfinite(reading.grad_norm)
    overflows = history.overflows_in_a_row + overflowed
    small = not reading.loss_scale > config.searched_scale
    most = min(config.max_overflows_in_a_row, config.endless_overflows) if small else config.endless_overflows
    endless = overflowed and overflows >= most
    if reading.loss_scale >= config.floor and not endless:
        return None
    return SCALER_COLLAPSE.find(
        step=reading.step, loss=reading.loss, loss_scale=reading.loss_scale, overflows=overflows
    )
