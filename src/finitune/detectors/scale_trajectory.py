"""Scale trajectory: the loss scale goes on falling after its search should be over.

What it sees:
    At a step whose gradients overflowed under a loss scale: the share of overflows in the last 20 tries, and how far
    the scale has fallen below the highest at which a step was committed lately. It speaks above `max_rate` or
    from `max_fall_bits` halvings on. The first `min_steps` committed steps are the search for a scale and
    are not judged; neither is a scale above all at which a step was committed lately: it has grown, or a scaler
    begins anew.

Why it is bad:
    A dynamic scale overflows some 5 to 16 times at the start and then about once in 2000 steps. More than that is no
    search: gradients outgrow fp16, or something makes NaN that no scale can cure. The weights stay finite, so the
    run looks healthy while ever fewer steps are made; generation in fp16 may fail already.

Example:
    65536 for 200 steps, then 7 overflows in 20 tries: scale 512, loss finite

What to do:
    precision: bf16 (the range of fp32); else fp32 for the modules that overflow. If it began with one row or
    after a change of data: look there first.

Source:
    Micikevicius et al. 2018, "Mixed Precision Training", section 3.2; measured: a small Llama at a learning rate of
    0.05 hid its forward overflow for 209 steps behind the scaler, then skipped 72 steps down to a scale of 1e-17.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from finitune.core.codes import Code, Text
from finitune.core.robust import History
from finitune.core.types import Finding, Reading, Severity
from finitune.detectors._checks import above, at_least

SCALE_FALLS = Code(
    "NUM021",
    Severity.WARNING,
    Text(
        "the loss scale does not settle",
        "{overflows} of the last {tries} tries overflowed; the loss scale is {loss_scale} at step {step} and was "
        "{highest_scale} lately (loss {loss}).",
        "This is no longer the search for a scale, which needs 5 to 16 overflows at the start: gradients outgrow fp16, "
        "or something makes NaN at any scale. The weights are finite, but fewer and fewer steps are made.",
        (
            "use precision: bf16",
            "where the device has no bf16: precision: fp32, or fp32 for the modules that overflow",
            "if it began with certain rows: look at these",
        ),
    ),
    Text(
        "损失缩放无法稳定",
        "最近 {tries} 次尝试中有 {overflows} 次溢出；"
        "第 {step} 步的损失缩放为 {loss_scale}，此前曾为 {highest_scale}（损失 {loss}）。",
        "这已不是寻找合适缩放的过程（开始时需要 5 到 16 次溢出）："
        "梯度超出了 fp16 的范围，或某处在任何缩放下都产生 NaN。"
        "权重仍是有限值，但完成的步数越来越少。",
        (
            "使用 precision: bf16",
            "设备不支持 bf16 时：precision: fp32，或让溢出的模块使用 fp32",
            "若从某些数据行开始：先检查这些行",
        ),
    ),
)

CODES = (SCALE_FALLS,)


@dataclass(frozen=True)
class Config:
    """Limits of a search that is over."""

    max_rate: float = 0.25
    """Share (0..1) of the last 20 tries that may overflow."""
    max_fall_bits: float = 8.0
    """Halvings below the highest scale of the last 64 committed steps."""
    min_steps: int = 20
    """Committed steps before anything is judged: until then the scale is searched for."""

    def __post_init__(self) -> None:
        above("max_rate", self.max_rate, 0.0)
        above("max_fall_bits", self.max_fall_bits, 0.0)
        at_least("min_steps", self.min_steps, 20)


def detect(history: History, reading: Reading, config: Config) -> Finding | None:
    """A warning, never a veto: what overflowed is refused by ``non_finite`` already."""
    scale = reading.loss_scale
    # A scale of 0 or less, or none that is a number, is the collapse that ``scaler_collapse`` tells.
    if scale is None or not (scale > 0 and math.isfinite(scale)) or history.num_committed < config.min_steps:
        return None
    if not math.isfinite(reading.loss) or math.isfinite(reading.grad_norm):
        return None
    highest = max(history.log2_scale, default=math.log2(scale))
    if math.log2(scale) > highest:
        return None
    tries = [*history.overflows.tail(19), 1.0]
    often = len(tries) == 20 and sum(tries) > config.max_rate * len(tries)
    if not often and highest - math.log2(scale) < config.max_fall_bits:
        return None
    return SCALE_FALLS.find(
        step=reading.step,
        loss=reading.loss,
        loss_scale=scale,
        overflows=int(sum(tries)),
        tries=len(tries),
        highest_scale=2.0**highest,
    )
