"""Gradient ramp: the gradient norm climbs step by step, each one higher than anything seen lately.

What it sees:
    ln(gradient norm before clipping) of this step and of the committed ones before it. It speaks when the last
    `ramp_steps` norms each exceed the one before, all of them exceed everything in the `recent_steps` before
    them, no single step makes more than half of the climb, and the newest is above the median by `factor` and
    by `num_sigmas` robust standard deviations.

Why it is bad:
    Large runs that blew up showed such a ramp some steps before the loss did; every second of those steps went
    into Adam's moments. Nothing is refused for it: no single step is at fault, and it may stop by itself. Noise
    makes no ramp: that the last four of 68 norms are the four largest, and in order, has the chance of 5e-8.

Example:
    norms around 1.0 (0.8 to 1.3), then 1.6, 2.1, 2.8, 3.6: a warning at 3.6

What to do:
    A smaller learning rate or a longer warm-up; max_grad_norm: 1.0 where nothing is clipped. Keep the checkpoint
    of before the ramp.

Source:
    BigScience 2022, chronicles of the 176B model (the norm climbs before the loss); OLMo team 2024, "2 OLMo 2
    Furious", section 3 (spikes of the norm go before those of the loss).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice, pairwise

from finitune.core.codes import Code, Text
from finitune.core.robust import History, bounded_exp
from finitune.core.types import Finding, Reading, Severity
from finitune.detectors._checks import above, at_least

GRADIENT_RAMP = Code(
    "NUM012",
    Severity.WARNING,
    Text(
        "the gradient norm is climbing",
        "The gradient norm has climbed for {count} steps to {grad_norm} at step {step}, {times} times the median "
        "{median}; before that the highest was {highest}.",
        "A steady climb of the norm often goes before a blow-up of the loss. The steps are committed: none of them "
        "is at fault by itself, and the climb may stop.",
        (
            "a smaller learning_rate or more warmup_ratio",
            "set max_grad_norm: 1.0 if there is no clipping",
            "if the data grows harder on purpose: raise guard.detectors.gradient_ramp.factor",
        ),
    ),
    Text(
        "梯度范数持续上升",
        "梯度范数已连续上升 {count} 步，第 {step} 步达到 {grad_norm}，是中位数 {median} 的 {times} 倍；"
        "此前最高为 {highest}。",
        "梯度范数稳步上升往往先于损失爆炸。这些步已照常提交：单独哪一步都没有错，上升也可能自行停止。",
        (
            "减小 learning_rate 或增大 warmup_ratio",
            "若未裁剪梯度：设置 max_grad_norm: 1.0",
            "若数据有意逐渐变难：增大 guard.detectors.gradient_ramp.factor",
        ),
    ),
)

CODES = (GRADIENT_RAMP,)

_SIGMA_FLOOR = 0.05


@dataclass(frozen=True)
class Config:
    """What makes a climb a ramp."""

    ramp_steps: int = 4
    """Norms in a row that each exceed the one before and all of the past."""
    recent_steps: int = 64
    """How many committed norms before the ramp count as the past."""
    factor: float = 2.5
    """The newest is at least this many times the median of the past."""
    num_sigmas: float = 4.0
    """And at least this many robust standard deviations of ln(norm) above it."""
    min_steps: int = 24
    """Committed norms before anything is judged."""

    def __post_init__(self) -> None:
        at_least("ramp_steps", self.ramp_steps, 3)
        at_least("recent_steps", self.recent_steps, 8)
        above("factor", self.factor, 1.0)
        above("num_sigmas", self.num_sigmas, 0.0)
        at_least("min_steps", self.min_steps, 8)


def detect(history: History, reading: Reading, config: Config) -> Finding | None:
    """A warning, never a veto; None for what is not finite or has no logarithm."""
    norms = history.log_grad_norm
    if not (math.isfinite(reading.loss) and math.isfinite(reading.grad_norm) and reading.grad_norm > 0):
        return None
    if len(norms) < config.min_steps:
        return None
    ramp = [*norms.tail(config.ramp_steps - 1), math.log(reading.grad_norm)]
    if any(b <= a for a, b in pairwise(ramp)):
        return None
    centre, highest = norms.median(), _highest_before(history, config)
    limit = centre + max(math.log(config.factor), config.num_sigmas * max(norms.sigma(), _SIGMA_FLOOR))
    if ramp[0] <= highest or ramp[-1] <= limit or not _is_gradual(highest, ramp):
        return None
    return GRADIENT_RAMP.find(
        step=reading.step,
        grad_norm=reading.grad_norm,
        count=config.ramp_steps,
        median=bounded_exp(centre),
        highest=bounded_exp(highest),
        times=bounded_exp(ramp[-1] - centre),
    )


def _highest_before(history: History, config: Config) -> float:
    """Logarithm of the highest committed norm of the past before the ramp."""
    end = len(history.log_grad_norm) - (config.ramp_steps - 1)
    return max(islice(history.log_grad_norm, max(0, end - config.recent_steps), end))


def _is_gradual(highest: float, ramp: list[float]) -> bool:
    """No single step makes more than half of the climb: a new level that stays is no ramp."""
    points = [highest, *ramp]
    jumps = [b - a for a, b in pairwise(points)]
    return max(jumps) <= 0.5 * (points[-1] - points[0])
