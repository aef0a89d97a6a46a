"""Headroom trend: the activations grow towards the limit of fp16 so steadily that the overflow can be foretold.

What it sees:
    The headroom, log2(65504 / largest magnitude), of the worst module group over the last 20 to 40 measurements.
    A straight line is laid through the least values of blocks of 5. It speaks, once every 10 measurements, when
    the line falls clearly (its slope is 5 times its standard error; 10 times for few values), the headroom is
    below 2 bits, has lost half a bit since the start or is below half a bit, and the line ends within 100 steps.

Why it is bad:
    The step that crosses 0 bits has a NaN loss. Loss and gradient norm look normal until then. The forecast
    is a range and never a date: on runs that did overflow, the date was off by 8 to 31 steps in the median,
    and some came to rest before the limit. Nothing is refused for it.

Example:
    mlp.down_proj of layers 11-27: 1.9 bits left, 0.05 fewer each step: overflow in 19 to 152 steps

What to do:
    precision: bf16 (the range of fp32). Where the device has no bf16: the named modules in fp32, or fp32
    for the whole run. A smaller learning rate only delays it.

Source:
    Measured on 16 fp16 runs of a small Llama (10 overflowed, each in a down_proj) and on a 135M model that
    overflowed at step 159. Draper & Smith, "Applied Regression Analysis", section 1.4 (standard error of a slope).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from finitune.core.codes import Code, Text
from finitune.core.robust import History
from finitune.core.types import Finding, Reading, Severity
from finitune.detectors._checks import above, at_least
from finitune.detectors._groups import loudest_group

FORECAST = Code(
    "NUM031",
    Severity.WARNING,
    Text(
        "an fp16 overflow is coming",
        "{part} of layers {layers}: {bits} bits left at step {step}, {per_step} bits fewer each step. If this goes on, "
        "overflow in about {steps_low} to {steps_high} steps.",
        "The largest activations grow steadily towards 65504, the limit of fp16. The step that crosses it has a NaN "
        "loss; until then loss and gradient norm look normal. It is a range: growth may slow down or stop.",
        (
            "use precision: bf16 (the range of fp32)",
            "where the device has no bf16: keep the named modules in fp32, or use precision: fp32",
            "guard.act_on_forecast: true lets the guard do that before the overflow",
        ),
    ),
    Text(
        "fp16 即将溢出",
        "第 {layers} 层的 {part}：第 {step} 步只剩 {bits} 位，每步减少 {per_step} 位。若持续下去，约 {steps_low} 到 "
        "{steps_high} 步后溢出。",
        "最大的激活值正稳步接近 fp16 的上限 65504。越过上限的那一步损失为 NaN；在此之前损失和梯度范数看起来都正常。"
        "这只是一个范围：增长可能放缓或停止。",
        (
            "使用 precision: bf16（范围与 fp32 相同）",
            "设备不支持 bf16 时：让上述模块使用 fp32，或整个训练使用 precision: fp32",
            "设置 guard.act_on_forecast: true 可让守护程序在溢出之前处理",
        ),
    ),
)

CODES = (FORECAST,)

# Measurements of a block: its least value is smoother than a single one, which depends on the batch.
_BLOCK = 5
# From half of the time that a line foretells to four times it: in three recorded fp16 runs the headroom reached 0
# within that range for 11 of 15 forecasts; of the others, growth had slowed down and it came later.
_EARLIER, _LATER = 2.0, 4.0


@dataclass(frozen=True)
class Config:
    """When a trend is clear enough to be told."""

    armed_bits: float = 2.0
    """Above this a loss of headroom is normal growth."""
    min_bits: float = 0.5
    """Below this a falling line is told whatever the run began with."""
    max_drop_bits: float = 0.5
    """Loss since the first step from which on a falling line is told, once armed."""
    window_steps: int = 40
    """Measurements that the line is laid through, at most 40."""
    min_steps: int = 20
    """Fewest measurements that a line is laid through."""
    every_steps: int = 10
    """Measurements between two forecasts."""
    min_certainty: float = 5.0
    """Slope of the line over its standard error; twice as much for half of the values."""
    horizon_steps: int = 100
    """A line that reaches 0 bits later than this says nothing."""

    def __post_init__(self) -> None:
        above("armed_bits", self.armed_bits, 0.0)
        above("min_bits", self.min_bits, 0.0)
        above("max_drop_bits", self.max_drop_bits, 0.0)
        at_least("window_steps", self.window_steps, 4 * _BLOCK)
        at_least("min_steps", self.min_steps, 4 * _BLOCK)
        at_least("every_steps", self.every_steps, 1)
        above("min_certainty", self.min_certainty, 0.0)
        at_least("horizon_steps", self.horizon_steps, 1)


@dataclass(frozen=True, slots=True)
class Line:
    """A straight line through the least values of blocks."""

    slope: float
    """Bits a step."""
    late_slope: float
    """Of the newer half alone: growth that slows down ends later, or never."""
    certainty: float
    """Size of the slope over its standard error (inf for points that lie on the line), less where they are few."""


def detect(history: History, reading: Reading, config: Config) -> Finding | None:
    """A warning, never a veto."""
    bits = reading.headroom_bits
    if bits is None or not (math.isfinite(bits) and bits > 0 and math.isfinite(reading.loss)):
        return None
    if (history.num_headrooms + 1) % config.every_steps or not _is_armed(bits, history.first_headroom_bits, config):
        return None
    line = line_of(history, bits, config)
    if line is None or not (line.slope < 0 and line.late_slope < 0 and line.certainty >= config.min_certainty):
        return None
    soon, late = sorted(bits / -slope for slope in (line.slope, line.late_slope))
    if late > config.horizon_steps:
        return None
    return _told(reading, bits, line, soon, late)


def _is_armed(bits: float, first_bits: float, config: Config) -> bool:
    dropped = not math.isnan(first_bits) and first_bits - bits > config.max_drop_bits
    return bits < config.armed_bits and (dropped or bits < config.min_bits)


def line_of(history: History, bits: float, config: Config) -> Line | None:
    """The line through past headrooms and this one; None where there are too few."""
    values = [*history.headroom_bits.tail(config.window_steps - 1), bits]
    steps = [*history.headroom_at.tail(config.window_steps - 1), float(history.num_committed)]
    count = min(len(values), len(steps)) // _BLOCK
    if count * _BLOCK < config.min_steps:
        return None
    starts = range(len(values) - count * _BLOCK, len(values), _BLOCK)
    least = [min(values[i : i + _BLOCK]) for i in starts]
    middle = [sum(steps[i : i + _BLOCK]) / _BLOCK for i in starts]
    slope, certainty = _fit(middle, least)
    late_slope, _ = _fit(middle[count // 2 :], least[count // 2 :])
    return Line(slope, late_slope, certainty * count * _BLOCK / config.window_steps)


def _fit(steps: list[float], values: list[float]) -> tuple[float, float]:
    """(slope, its size over its standard error) by least squares; (0, 0) where all points stand on one step."""
    count = len(steps)
    mean_step, mean_value = sum(steps) / count, sum(values) / count
    spread = sum((s - mean_step) ** 2 for s in steps)
    if not spread > 0:
        return 0.0, 0.0
    slope = sum((s - mean_step) * (v - mean_value) for s, v in zip(steps, values, strict=True)) / spread
    misses = sum((v - mean_value - slope * (s - mean_step)) ** 2 for s, v in zip(steps, values, strict=True))
    error = math.sqrt(misses / max(1, count - 2) / spread)
    return slope, abs(slope) / error if error > 0 else math.inf


def _told(reading: Reading, bits: float, line: Line, soon: float, late: float) -> Finding:
    group = loudest_group(reading.amax)
    modules = group.modules if group is not None else ()
    return FORECAST.find(
        modules[0] if modules else "",
        step=reading.step,
        module=modules[0] if modules else "-",
        modules=list(modules),
        part=group.part if group is not None else "-",
        layers=group.layers if group is not None else "-",
        bits=bits,
        per_step=-line.slope,
        steps_low=max(1, math.floor(soon / _EARLIER)),
        steps_high=max(10, math.ceil(late * _LATER)),
    )
