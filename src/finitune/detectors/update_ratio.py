"""Update ratio: each step changes the weights by too large a part of themselves.

What it sees:
    The norm of a step's change over the norm of the weights, on a sample of the elements, as far as it was measured.
    It speaks once when a ratio crosses `huge`, when the last `long_measurements` are all above `high` and do
    not fall, or when `ramp_measurements` in a row climb to above `high` and to `ramp_factor` times the median.

Why it is bad:
    Fine-tuning moves weights by about 1e-3 of their size or less in a step. From 1e-2 on, a hundred steps replace what
    the model has learnt. It shows a learning rate that is too high before the loss does. It is a note: tiny models
    and young LoRA matrices can bear 1e-2 for some time.

Example:
    3e-4, 3e-4, then with the warm-up 8e-3, 1.4e-2, 2e-2, ... while the loss still falls

What to do:
    Divide the learning rate by 3 to 10 if the loss becomes restless. With LoRA: compare with lora.alpha / lora.r.

Source:
    Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 2.2 (why warm-up); the rule of thumb of about
    1e-3 is from A. Karpathy, lecture notes of CS231n, "Ratio of weights:updates".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from finitune.core.codes import Code, Text
from finitune.core.robust import History
from finitune.core.types import Finding, Reading, Severity
from finitune.detectors._checks import above, at_least

UPDATE_RATIO = Code(
    "OPT004",
    Severity.NOTE,
    Text(
        "the updates are large for the weights",
        "The step before {step} changed the weights by {percent} % of their norm (median {median_percent} %, learning "
        "rate {lr}).",
        "Fine-tuning moves weights by 0.1 % a step or less. From 1 % on, what the model has learnt is soon replaced; "
        "the loss tells it only later.",
        (
            "a learning_rate 3 to 10 times smaller, if the loss becomes restless",
            "more warmup_ratio",
            "for a tiny or a new model: nothing, if the loss falls",
        ),
    ),
    Text(
        "更新相对于权重过大",
        "第 {step} 步之前的一步使权重变化了其范数的 {percent} %（中位数 {median_percent} %，学习率 {lr}）。",
        "微调时每步通常只改变权重的 0.1 % 或更少。"
        "达到 1 % 以上时，模型学到的内容很快会被覆盖，而损失要晚一些才会显示出来。",
        (
            "若损失开始不稳定：将 learning_rate 减小 3 到 10 倍",
            "增大 warmup_ratio",
            "对很小的或全新的模型：只要损失在下降，无需处理",
        ),
    ),
)

CODES = (UPDATE_RATIO,)


@dataclass(frozen=True)
class Config:
    """Limits of ||change|| / ||weights|| of one step."""

    high: float = 0.01
    """Above this for long, or at the top of a climb."""
    huge: float = 0.1
    """Above this at once."""
    long_measurements: int = 8
    """Measurements in a row above ``high``."""
    ramp_measurements: int = 4
    """Measurements in a row that climb."""
    ramp_factor: float = 5.0
    """The newest is at least this many times the median."""

    def __post_init__(self) -> None:
        above("high", self.high, 0.0)
        above("huge", self.huge, 0.0)
        at_least("long_measurements", self.long_measurements, 4)
        at_least("ramp_measurements", self.ramp_measurements, 3)
        above("ramp_factor", self.ramp_factor, 1.0)


def detect(history: History, reading: Reading, config: Config) -> Finding | None:
    """A note, never a veto; None where the ratio was not measured."""
    ratio = reading.update_ratio
    if ratio is None or not (math.isfinite(ratio) and ratio > config.high):
        return None
    past = list(history.update_ratio)
    if not (_is_new_and_huge(past, ratio, config) or _lasts(past, ratio, config) or _climbs(past, ratio, config)):
        return None
    return UPDATE_RATIO.find(
        step=reading.step,
        ratio=ratio,
        percent=100.0 * ratio,
        median_percent=100.0 * median([*past, ratio]),
        lr=reading.lr,
    )


def _is_new_and_huge(past: list[float], ratio: float, config: Config) -> bool:
    return ratio > config.huge and not (past and past[-1] > config.huge)


def _lasts(past: list[float], ratio: float, config: Config) -> bool:
    """High for long, and so for the first time: told once."""
    recent = [*past, ratio][-config.long_measurements :]
    before = past[: len(past) + 1 - config.long_measurements]
    if len(recent) < config.long_measurements or min(recent) <= config.high or (before and before[-1] > config.high):
        return False
    half = config.long_measurements // 2
    return median(recent[half:]) >= 0.8 * median(recent[:half])


def _climbs(past: list[float], ratio: float, config: Config) -> bool:
    """At the top of a climb and high for the first time."""
    climb = [*past[1 - config.ramp_measurements :], ratio]
    if len(climb) < config.ramp_measurements or any(b <= a for a, b in pairwise(climb)) or past[-1] > config.high:
        return False
    return ratio >= config.ramp_factor * median(past)
