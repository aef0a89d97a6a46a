"""Runaway: the loss is finite and leaves everything that the run has seen, and does not come back.

What it sees:
    Six shapes, each judged by the committed past. "Usual" is the median of the losses before the shape began:
    climbing   the last `climb_steps` are above `factor` times the usual loss and by `min_rise` nats, many robust
               standard deviations and everything seen lately, got there by degrees, and still rise;
    beyond     two in a row are above `beyond_factor` times the usual loss and by `beyond_rise` nats, and above
               everything seen lately (in the first
               `min_steps` steps, where nothing else judges, one is enough if it is far enough);
    lost       the last `lost_steps` are all above `lost_factor` times the usual loss and by `lost_rise` nats. Where
               `guess_loss`, ln(number of tokens), is known: all near it, after having been far below;
    raised     the last `raised_steps` are all above `raised_factor` times the usual loss and everything seen lately,
               while the learning rate has grown by `lr_growth` times, to where a step changes the weights by more
               than `raised_update` of their size (where that was measured);
    unstarted  in its first 64 steps the last `raised_steps` are all above 1.6 times its first five, and by 3 nats;
    unforgotten  a step changes the weights by more than `long_update` of their size, and the last `lost_steps` are
               above `far_factor` times the usual loss and everything seen lately, or the last `raised_steps` are all
               above the usual loss, their median by `long_factor` and by the spread of the losses. From the first
               steps on.

Why it is bad:
    A learning rate far too high destroys the model without a single NaN in fp32 and bf16: the loss climbs, or drops
    onto the level of guessing and stays. Every further step is lost work. No step is refused for it, because none
    is at fault alone; it opens an incident, which goes back to before the climb and tries a lower learning rate.

Example:
    losses around 2.4, then 8.9, 11.2, 10.9, 10.8, 10.8, 10.8: reported at the sixth (ln 49152 = 10.8)

What to do:
    Go back to a checkpoint of before the climb; a tenth of the learning rate and a warm-up.

Source:
    Measured: AdamW at learning rates 0.3 to 3 in fp32 and bf16 (losses 112 to 1137, no NaN), SGD at 1 (5, 691, 4e4).
    Wortsman et al. 2023, "Small-scale proxies for large-scale Transformer training instabilities".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from finitune.core.codes import Code, Text
from finitune.core.robust import MAD_TO_SIGMA, History, bounded_exp
from finitune.core.types import Finding, Reading, Severity
from finitune.detectors._checks import above, at_least

RUNAWAY = Code(
    "OPT003",
    Severity.ERROR,
    Text(
        "the loss runs away",
        "The loss is {loss} at step {step} and was around {before} before; the last {count} were at least {lowest}.",
        "The loss is finite, so nothing stops the run, but the model is losing what it knew. Most often the learning "
        "rate is far too high. The step itself is not refused; the run should go back to before the climb.",
        (
            "go back to a checkpoint from before the climb with a tenth of the learning_rate",
            "warmup_ratio: 0.05 if there is no warm-up",
            "if the data changed on purpose at this step: raise guard.detectors.runaway.lost_factor",
        ),
    ),
    Text(
        "损失失控",
        "第 {step} 步的损失为 {loss}，此前约为 {before}；最近 {count} 步都不低于 {lowest}。",
        "损失仍是有限值，所以没有什么会停止训练，但模型正在丢失原有的能力。多半是学习率过大。该步本身不会被拒绝；"
        "训练应回到上升之前。",
        (
            "回到上升之前的检查点，learning_rate 减为十分之一",
            "若没有预热：设置 warmup_ratio: 0.05",
            "若从这一步起有意更换了数据：增大 guard.detectors.runaway.lost_factor",
        ),
    ),
)

CODES = (RUNAWAY,)

_SIGMA_FLOOR = 0.05
# Steps before the newest that may already belong to the climb: they are not asked what normal is.
_CLIMB_SPAN = 16
# A loss this many times the first is beyond doubt even where the gradient norm is not extraordinary.
_ABSURD = 100.0
# Committed losses that a shape is compared with.
_RECENT = 64
# What a run began with: the median of so many losses, and how far above it a model has got nowhere.
_START, _START_FACTOR, _START_RISE = 5, 1.6, 3.0
# What an early loss is compared with, where the loss falls quickly or the run is young.
_NEWER = 24


@dataclass(frozen=True)
class Config:
    """Limits of the shapes."""

    factor: float = 2.0
    """Climbing: at least this many times the median of before."""
    min_rise: float = 1.0
    """Climbing: at least this much above it, in the loss's unit (nats)."""
    num_sigmas: float = 6.0
    """Climbing: at least this many robust standard deviations of ln(loss) above it."""
    climb_steps: int = 6
    """Climbing: losses in a row that are so high."""
    beyond_factor: float = 10.0
    """Beyond: at least this many times the first loss and the median."""
    beyond_rise: float = 8.0
    """Beyond: at least this much above both, in nats: guessing among 250000 tokens is 12.4."""
    lost_factor: float = 3.0
    """Lost: at least this many times what it was."""
    lost_rise: float = 4.0
    """Lost: at least this much above what it was, in nats."""
    lost_steps: int = 6
    """Lost: losses in a row that are so high."""
    raised_factor: float = 1.3
    """Raised: at least this many times the usual loss."""
    raised_steps: int = 12
    """Raised, unstarted: losses in a row that are so high."""
    raised_update: float = 0.01
    """Raised: ||update|| / ||weights|| of a step, as measured and in proportion to the learning rate."""
    lr_growth: float = 1.5
    """Raised: the learning rate over its median before."""
    long_update: float = 0.03
    """Unforgotten: ||update|| / ||weights|| of a step, as measured and in proportion to the learning rate."""
    long_factor: float = 1.15
    """Unforgotten: the median of `raised_steps` losses over the usual one."""
    far_factor: float = 1.5
    """Unforgotten: each of `lost_steps` losses over the usual one."""
    guess_loss: float = 0.0
    """ln(number of tokens of the vocabulary): the loss of guessing, in nats; 0: not known."""
    min_steps: int = 20
    """Committed steps before a climb is judged; up to then one loss far beyond is enough."""

    def __post_init__(self) -> None:
        above("factor", self.factor, 1.0)
        at_least("min_rise", self.min_rise, 0.0)
        above("num_sigmas", self.num_sigmas, 0.0)
        at_least("climb_steps", self.climb_steps, 4)
        above("beyond_factor", self.beyond_factor, 1.0)
        at_least("beyond_rise", self.beyond_rise, 0.0)
        above("lost_factor", self.lost_factor, 1.0)
        at_least("lost_rise", self.lost_rise, 0.0)
        at_least("lost_steps", self.lost_steps, 2)
        above("raised_factor", self.raised_factor, 1.0)
        at_least("raised_steps", self.raised_steps, 4)
        above("raised_update", self.raised_update, 0.0)
        above("lr_growth", self.lr_growth, 1.0)
        above("long_update", self.long_update, 0.0)
        above("long_factor", self.long_factor, 1.0)
        above("far_factor", self.far_factor, 1.0)
        at_least("guess_loss", self.guess_loss, 0.0)
        at_least("min_steps", self.min_steps, 2)


def detect(history: History, reading: Reading, config: Config) -> Finding | None:
    """An error, never a veto; None for losses that are not finite or not positive."""
    losses, loss = history.log_loss, reading.loss
    if not (math.isfinite(loss) and loss > 0 and len(losses) and history.first_loss > 0):
        return None
    newest = math.log(loss)
    # On a healthy run nearly every step ends here: after the first steps it takes two high losses in a row.
    if len(losses) >= config.min_steps and min(newest, *losses.tail(1)) <= losses.median() + math.log(1.05):
        return None
    values = [*losses, newest]
    count = (
        _beyond(history, values, reading, config)
        or _lost(history, values, config)
        or _climbing(values, config)
        or _raised(history, values, reading.lr, config)
        or _unstarted(history, values, config)
        or _unforgotten(history, values, reading.lr, config)
    )
    return _told(history, reading, values, count) if count else None


def _told(history: History, reading: Reading, values: list[float], count: int) -> Finding:
    before = values[:-count]
    return RUNAWAY.find(
        step=reading.step,
        loss=reading.loss,
        before=bounded_exp(median(before)) if before else history.first_loss,
        count=count,
        lowest=bounded_exp(min(values[-count:])),
        first_loss=history.first_loss,
    )


def _usual(history: History, before: list[float], config: Config) -> float:
    """The loss that is normal: the median, but the highest of the first steps, of which some may have been easy."""
    if len(before) >= config.min_steps:
        return bounded_exp(median(before))
    return max(history.first_loss, bounded_exp(max(before))) if before else history.first_loss


def _beyond(history: History, values: list[float], reading: Reading, config: Config) -> int:
    """How many losses in a row are far beyond everything; 0: no shape of that kind."""
    usual = _usual(history, values[:-2], config)
    limit = max(config.beyond_factor * usual, usual + config.beyond_rise)
    if min(reading.loss, bounded_exp(values[-2])) > limit and _is_no_noise(values[:-2], min(values[-2:]), config):
        return 2
    usual = _usual(history, values[:-1], config)
    limit = max(config.beyond_factor * usual, usual + config.beyond_rise)
    if len(values) > config.min_steps or not reading.loss > limit:
        return 0
    # The norm of one early step says little by itself; together with such a loss it says enough.
    wild = reading.grad_norm > config.beyond_factor * bounded_exp(history.log_grad_norm.median())
    return 1 if wild or reading.loss > _ABSURD * usual else 0


def _is_no_noise(before: list[float], value: float, config: Config) -> bool:
    """Beyond what the noise of the run explains: two such losses in a row come by chance in a run of heavy tails."""
    if len(before) < config.min_steps:
        return True
    return value > max(median(before) + config.num_sigmas * _sigma(before) / 2, *before[-_RECENT:])


def _lost(history: History, values: list[float], config: Config) -> int:
    """The number of losses on a level that is out of all proportion; 0: none."""
    count = config.lost_steps
    if len(values) <= count:
        return 0
    usual, lowest = _usual(history, values[:-count], config), bounded_exp(min(values[-count:]))
    if lowest > max(config.lost_factor * usual, usual + config.lost_rise):
        return count
    guessing = config.guess_loss > 0 and lowest >= 0.85 * config.guess_loss and usual <= 0.6 * config.guess_loss
    return count if guessing else 0


def _climbing(values: list[float], config: Config) -> int:
    """The number of losses at the upper end of a climb; 0: none."""
    before, climb = values[:-_CLIMB_SPAN], values[-_CLIMB_SPAN:]
    if len(before) < config.min_steps:
        return 0
    usual, sigma = median(before), _sigma(before)
    high = climb[-config.climb_steps :]
    far = max(math.log(config.factor), config.num_sigmas * sigma)
    rise = bounded_exp(min(high)) - bounded_exp(usual)
    if not (min(high) > max(usual + far, *before[-_RECENT:]) and rise > config.min_rise):
        return 0
    gradual = _is_gradual(usual, [before[-1], *climb], sigma)
    return config.climb_steps if gradual and _still_rises(high, sigma) else 0


def _sigma(values: list[float]) -> float:
    centre = median(values)
    return max(MAD_TO_SIGMA * median([abs(v - centre) for v in values]), _SIGMA_FLOOR)


def _still_rises(high: list[float], sigma: float) -> bool:
    half = len(high) // 2
    return median(high[half:]) - median(high[:half]) > max(sigma, math.log(1.1))


def _is_gradual(usual: float, climb: list[float], sigma: float) -> bool:
    """No single step makes most of the climb: a change of data is a step, a runaway is a slope."""
    steepest = max(b - a for a, b in pairwise(climb))
    return steepest <= max(0.4 * (max(climb[-3:]) - usual), 2.0 * sigma)


def _raised(history: History, values: list[float], lr: float, config: Config) -> int:
    """The number of losses on a level that came with a growing learning rate and does not fall; 0: none."""
    count = config.raised_steps
    before, high = values[:-count], values[-count:]
    rates = list(history.log_lr)[: 1 - count]
    if len(before) < config.min_steps or not rates or not (lr > 0 and math.isfinite(lr)):
        return 0
    grown = math.log(lr) - median(rates[-_RECENT:]) >= math.log(config.lr_growth)
    if not grown or not _updates_are_large(history, lr, config.raised_update):
        return 0
    usual = median(before[-_RECENT:])
    far = max(math.log(config.raised_factor), config.num_sigmas * _sigma(before[-_RECENT:]) / 2)
    falls = median(high[count // 2 :]) < median(high[: count // 2]) - _SIGMA_FLOOR
    return count if min(high) > max(before[-_RECENT:]) and median(high) > usual + far and not falls else 0


def _updates_are_large(history: History, lr: float, least: float) -> bool:
    """False where no update was measured: harder data in a warm-up looks the same but for this."""
    measured = history.log_update_per_lr
    return len(measured) > 0 and measured.median() + math.log(lr) > math.log(least)


def _unstarted(history: History, values: list[float], config: Config) -> int:
    """The number of losses above those that the run began with, while these are still known; 0: none."""
    count = config.raised_steps
    if not count + _START <= len(values) <= _RECENT or history.num_committed > len(history.log_loss):
        return 0
    start = max(history.first_loss, bounded_exp(median(values[:_START])))
    lowest = bounded_exp(min(values[-count:]))
    return count if lowest > max(_START_FACTOR * start, start + _START_RISE) else 0


def _unforgotten(history: History, values: list[float], lr: float, config: Config) -> int:
    """The number of losses on a raised level while the weights are being replaced; 0: none."""
    if not (lr > 0 and math.isfinite(lr)) or not _updates_are_large(history, lr, config.long_update):
        return 0
    few, many = config.lost_steps, config.raised_steps
    before, high = values[:-few], values[-few:]
    if before and min(high) > max(_level(history, before) + math.log(config.far_factor), *before[-_NEWER:]):
        return few
    before, high = values[:-many], values[-many:]
    if not before:
        return 0
    usual = _level(history, before)
    # A few first losses tell no spread: that of the level itself then says how easy they may have been by chance.
    by_chance = 3.0 * _sigma(high) if len(before) < many else 0.0
    far = max(math.log(config.long_factor), 1.5 * _sigma(before[-_RECENT:]), by_chance)
    return many if min(high) > usual and min(median(high), median(high[many // 2 :])) > usual + far else 0


def _level(history: History, before: list[float]) -> float:
    """The usual loss as ln; of few losses, of which the first may have been easy, the highest but for a rise."""
    if len(before) >= _START:
        return median(before[-_RECENT:])
    return max(math.log(history.first_loss), median(before))
