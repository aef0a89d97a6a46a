"""Headroom: the largest activation comes close to the largest number of the half format.

What it sees:
    headroom = log2(largest half number / largest magnitude) of the worst monitored module (fp16: 65504).
    It speaks when the headroom is below `min_bits`, or when it is below `armed_bits` and either this is
    the first step or more than `max_drop_bits` have been lost since the first step: once, and again for every
    further `max_drop_bits` that are lost. A run that stays where it is has been told.

Why it is bad:
    In fp16 the step that crosses 0 bits has a NaN loss. The loss, and the gradient norm too, look normal
    until then, so nothing else gives a warning. It is a forecast and never a veto: a run may sit at 0.3
    bits for hundreds of steps.

Example:
    a 135M model whose massive activations reach 25800 starts with 1.3 bits in fp16: a note at step 1

What to do:
    precision: bf16, which has the range of fp32. In fp32 nothing is to be done.

Source:
    Measured on 16 fp16 runs of a small Llama (10 overflowed): below 2 bits the warning came 15 to 147
    steps ahead (median 28) without a false alarm; in the last 30 steps one step lost 0.10 to 0.37 bits at
    most. Sun et al. 2024, "Massive Activations in Large Language Models".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from finitune.core.codes import Code, Text
from finitune.core.robust import History
from finitune.core.types import Finding, Reading, Severity
from finitune.detectors._checks import above

LOW_HEADROOM = Code(
    "NUM030",
    Severity.NOTE,
    Text(
        "little room is left before overflow",
        "{module} reaches {amax} at step {step}: {bits} bits below overflow (first step: {first_bits} bits).",
        "Activations grow while a model trains. In fp16 the step that crosses the limit has a NaN loss, and neither "
        "loss nor gradient norm warns of it.",
        (
            "use precision: bf16 (the range of fp32)",
            "where the device has no bf16: precision: fp32, or stop this run in time and keep its checkpoint",
        ),
    ),
    Text(
        "离溢出已很近",
        "第 {step} 步 {module} 达到 {amax}：离溢出只剩 {bits} 位（第一步为 {first_bits} 位）。",
        "训练中激活值会增大。在 fp16 中，越过上限的那一步损失为 NaN，而损失和梯度范数都不会预警。",
        (
            "使用 precision: bf16（范围与 fp32 相同）",
            "设备不支持 bf16 时：precision: fp32，或及时停止并保留检查点",
        ),
    ),
)

CODES = (LOW_HEADROOM,)


@dataclass(frozen=True)
class Config:
    """Limits of headroom, in bits (1 bit = a factor of 2)."""

    min_bits: float = 0.5
    """Below this the next step can overflow."""
    armed_bits: float = 2.0
    """Above this a loss of headroom is normal growth."""
    max_drop_bits: float = 0.5
    """Loss since the first step that is worth a note, once armed."""

    def __post_init__(self) -> None:
        above("min_bits", self.min_bits, 0.0)
        above("armed_bits", self.armed_bits, 0.0)
        above("max_drop_bits", self.max_drop_bits, 0.0)


def detect(history: History, reading: Reading, config: Config) -> Finding | None:
    """A note, never a veto."""
    bits = reading.headroom_bits
    if bits is None or not _is_low(bits, history.first_headroom_bits, config) or _was_told(bits, history, config):
        return None
    module, amax = _worst(reading)
    return LOW_HEADROOM.find(
        module, module=module, amax=amax, step=reading.step, bits=bits, first_bits=history.first_headroom_bits
    )


def _is_low(bits: float, first_bits: float, config: Config) -> bool:
    if not (bits >= config.min_bits):
        return True
    dropped = math.isnan(first_bits) or first_bits - bits > config.max_drop_bits
    return bits < config.armed_bits and dropped


def _was_told(bits: float, history: History, config: Config) -> bool:
    """The headroom was as low as this before, to the half bit, and that was low enough to be told."""
    lowest = history.lowest_headroom_bits
    if history.overflows_in_a_row:  # the same batch again at a smaller loss scale
        return True
    if math.isnan(lowest) or not math.isfinite(bits) or not _is_low(lowest, history.first_headroom_bits, config):
        return False
    crossed = bits < config.min_bits <= lowest
    return not crossed and _level(bits, config) <= _level(lowest, config)


def _level(bits: float, config: Config) -> int:
    return math.floor((config.armed_bits - bits) / config.max_drop_bits)


def _worst(reading: Reading) -> tuple[str, float]:
    """The module with the largest magnitude; a NaN is larger than anything."""
    if not reading.amax:
        return "-", math.nan
    return max(reading.amax.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])
