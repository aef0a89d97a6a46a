"""Healthy runs as plain numbers: thirty families with random parameters. Whatever is said of one is a false alarm.

They are wilder than real runs: heavy tails, rare rows, levels that change, losses of 0.001 and losses below 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from finitune.core.types import Reading

Rng = np.random.Generator
Array = np.ndarray


@dataclass
class Course:
    """A run before it becomes Readings; arrays have one value for each step."""

    loss: Array
    norm: Array
    supervised: Array | None = None
    first_scale: float | None = None
    """Loss scale at the start; None: no scaler."""
    needed_scale: float = 2.0**14
    """Gradients overflow at a scale above this one (times some noise)."""
    growth_steps: int = 2000
    bits: Array | None = None
    warm_up: int = 20
    scaler_restarts_at: int | None = None


def _decay(rng: Rng, steps: Array) -> Array:
    return np.log(rng.uniform(0.8, 1.6) + rng.uniform(0.5, 2.0) * np.exp(-steps / rng.uniform(30, 300)))


def _course(rng: Rng, log_loss: Array, log_norm: Array, loss_sigma: float = 0.1, norm_sigma: float = 0.3) -> Course:
    """Noise, of which a half is common to both: a hard batch has a larger gradient."""
    common, one, other = rng.standard_normal((3, log_loss.size))
    loss = log_loss + loss_sigma * (common + one) / math.sqrt(2)
    norm = log_norm + norm_sigma * (common + other) / math.sqrt(2)
    return Course(np.exp(loss), np.exp(norm) * 10 ** rng.uniform(-2, 2))


def _base(rng: Rng, steps: Array) -> Course:
    return _course(rng, _decay(rng, steps), 0.0 * steps, rng.uniform(0.03, 0.2), rng.uniform(0.1, 0.4))


def _raised(rng: Rng, steps: Array, where: Array, loss: float, norm: float) -> Course:
    """Some steps stand out by factors (loss, norm), a little different each time."""
    spread = np.exp(0.2 * rng.standard_normal(steps.size))
    course = _base(rng, steps)
    course.loss *= np.where(where, loss * spread, 1.0)
    course.norm *= np.where(where, norm * spread, 1.0)
    return course


def _levels(rng: Rng, steps: Array, of: tuple[float, ...], length: int) -> Array:
    return np.repeat(rng.choice(of, steps.size // length + 1), length)[: steps.size]


def _start_up(rng: Rng, steps: Array) -> Course:
    course = _base(rng, steps)
    course.first_scale, course.needed_scale = 65536.0, 2.0 ** rng.uniform(2, 12)
    course.growth_steps = int(rng.choice([200, 1000, 2000]))
    course.bits = 5.0 + 0.2 * rng.standard_normal(steps.size)
    return course


def _large_scale(rng: Rng, steps: Array) -> Course:
    course = _start_up(rng, steps)
    course.first_scale, course.needed_scale = 2.0**32, 2.0 ** rng.uniform(6, 24)
    return course


def _scaler_restart(rng: Rng, steps: Array) -> Course:
    course = _start_up(rng, steps)
    course.scaler_restarts_at = int(rng.integers(30, steps.size))
    return course


def _rare_rows(rng: Rng, steps: Array) -> Course:
    where = rng.random(steps.size) < 10 ** rng.uniform(-3.3, -1.5)
    return _raised(rng, steps, where, rng.uniform(2, 6), rng.uniform(4, 15))


def _hard_batches(rng: Rng, steps: Array) -> Course:
    hard = np.zeros(steps.size, dtype=bool)
    for start in rng.integers(0, steps.size, steps.size // 50):
        hard[start : start + int(rng.integers(1, 8))] = True
    return _raised(rng, steps, hard, rng.uniform(1.3, 3), rng.uniform(1.5, 4))


def _long_rows(rng: Rng, steps: Array) -> Course:
    where = rng.random(steps.size) < rng.uniform(0.005, 0.05)
    return _raised(rng, steps, where, rng.uniform(0.8, 1.5), rng.uniform(2, 8))


def _warm_up(rng: Rng, steps: Array) -> Course:
    warm_up = int(rng.integers(20, 400))
    growth = np.log(0.2 + np.minimum(steps / warm_up, 1.0))
    course = _course(rng, _decay(rng, steps), growth, 0.1, 0.25)
    course.warm_up = warm_up
    return course


def _restart(rng: Rng, steps: Array) -> Course:
    since = steps % int(rng.integers(80, 500))
    return _course(rng, _decay(rng, steps) + 0.25 * np.exp(-since / 10), 1.0 * np.exp(-since / 15), 0.1, 0.25)


def _epochs(rng: Rng, steps: Array) -> Course:
    epoch = steps // int(rng.integers(60, 400))
    return _course(rng, np.log(2.0) - 0.4 * np.minimum(epoch, 6), -0.2 * np.minimum(epoch, 6), 0.15, 0.3)


def _masked(rng: Rng, steps: Array) -> Course:
    """5 % of rows have no label: few tokens are supervised in some steps, and such losses are noisy."""
    tokens = np.maximum(1, rng.binomial(8, 0.95, steps.size) * rng.integers(1, 60, steps.size))
    noise = 1.5 * rng.standard_normal(steps.size) / np.sqrt(tokens)
    course = _course(rng, _decay(rng, steps) + noise, 0.8 * noise, 0.05, 0.3)
    course.supervised = tokens
    return course


def _curriculum(rng: Rng, steps: Array) -> Course:
    level = _levels(rng, steps, (0.0, 0.3, 0.6, 1.0), int(rng.integers(50, 500)))
    return _course(rng, _decay(rng, steps) + 0.7 * level, 1.1 * level, 0.12, 0.3)


def _tiny_batches(rng: Rng, steps: Array) -> Course:
    return _course(rng, _decay(rng, steps), 0.0 * steps, rng.uniform(0.3, 0.6), rng.uniform(0.4, 0.8))


def _experts(rng: Rng, steps: Array) -> Course:
    """Experts out of balance for some steps: bursts of the norm, a little more loss."""
    burst = np.zeros(steps.size)
    for start in rng.integers(0, steps.size, steps.size // 80):
        burst[start : start + int(rng.integers(2, 12))] = rng.uniform(0.3, 1.5)
    return _course(rng, _decay(rng, steps) + 0.1 * burst, burst, 0.1, 0.3)


def _student(rng: Rng, steps: Array) -> Course:
    loss = _decay(rng, steps) + rng.uniform(0.05, 0.15) * rng.standard_t(3, steps.size)
    norm = rng.uniform(0.15, 0.3) * rng.standard_t(3, steps.size)
    return Course(np.exp(np.clip(loss, -12, 5)), np.exp(np.clip(norm, -12, 8)))


def _log_normal(rng: Rng, steps: Array) -> Course:
    return _course(rng, _decay(rng, steps) - 0.5, 0.0 * steps, rng.uniform(0.6, 1.1), rng.uniform(0.7, 1.2))


def _pareto(rng: Rng, steps: Array) -> Course:
    """Both with a tail of exponent 2 (no variance), partly of one origin."""
    common, own = rng.pareto(2.0, (2, steps.size))
    course = _base(rng, steps)
    course.loss *= np.minimum(1.0 + 0.3 * common, 60.0)
    course.norm *= 1.0 + 0.7 * common + 0.7 * own
    return course


def _easy_and_hard(rng: Rng, steps: Array) -> Course:
    where = rng.random(steps.size) < 10 ** rng.uniform(-2, -0.4)
    course = _raised(rng, steps, where, rng.uniform(3, 12), rng.uniform(3, 12))
    course.loss *= 0.15
    return course


def _memorised(rng: Rng, steps: Array) -> Course:
    """Down to a loss of 0.001; now and then a row that is not known by heart yet."""
    fall = np.log(1e-3 + 2.0 * np.exp(-steps / rng.uniform(20, 60)))
    missed = (rng.random(steps.size) < 0.01) & (steps > 100)
    course = _course(rng, fall, 0.7 * fall, 0.8, 0.7)
    course.loss = np.where(missed, rng.uniform(0.02, 0.5, steps.size), course.loss)
    course.norm = np.where(missed, course.norm[:10].max() * rng.uniform(0.1, 0.7, steps.size), course.norm)
    return course


def _reinforcement(rng: Rng, steps: Array) -> Course:
    """Losses around 0 of either sign; where all rewards are alike there is neither loss nor gradient."""
    course = _course(rng, 0.0 * steps, 0.0 * steps, 0.1, rng.uniform(0.5, 0.9))
    course.loss = 0.05 * rng.standard_t(4, steps.size)
    alike = rng.random(steps.size) < rng.uniform(0.0, 0.3)
    course.loss, course.norm = np.where(alike, 0.0, course.loss), np.where(alike, 0.0, course.norm)
    return course


def _cyclic(rng: Rng, steps: Array) -> Course:
    wave = np.sin(2 * np.pi * steps / rng.uniform(15, 400))
    return _course(rng, _decay(rng, steps) + 0.15 * wave, 0.5 * math.log(10.0) * wave, 0.1, rng.uniform(0.1, 0.3))


def _slow_growth(rng: Rng, steps: Array) -> Course:
    return _course(rng, _decay(rng, steps), math.log(rng.uniform(3, 30)) * steps / steps.size, 0.1, 0.3)


def _noisier(rng: Rng, steps: Array) -> Course:
    """From some step on the batches are smaller: the same mean, more noise."""
    late = steps > rng.uniform(0.1, 0.9) * steps.size
    noise, other = rng.standard_normal((2, steps.size))
    loss_noise, norm_noise = np.where(late, 0.35, 0.08), np.where(late, 0.6, 0.15)
    return Course(np.exp(_decay(rng, steps) + loss_noise * noise), np.exp(norm_noise * (noise + other) / 1.4))


def _drifting(rng: Rng, steps: Array) -> Course:
    drift = np.zeros(steps.size)
    for i in range(1, steps.size):
        drift[i] = 0.9 * drift[i - 1] + 0.15 * rng.standard_normal()
    return _course(rng, _decay(rng, steps) + 0.3 * drift, drift, 0.1, 0.15)


def _new_head(rng: Rng, steps: Array) -> Course:
    return _course(rng, np.log(1.5 + 8.5 * np.exp(-steps / rng.uniform(15, 60))), -np.log1p(steps / 10), 0.1, 0.3)


def _preference(rng: Rng, steps: Array) -> Course:
    """From ln 2 to 0.05: the gradient of a pair that is told apart well is next to nothing."""
    margin = 3.0 * (1 - np.exp(-steps / rng.uniform(50, 300))) + rng.uniform(0.5, 1.5) * rng.standard_normal(steps.size)
    loss = np.log1p(np.exp(-margin))
    return Course(loss, (1 - np.exp(-loss)) * np.exp(0.3 * rng.standard_normal(steps.size)) * 8.0)


def _regression(rng: Rng, steps: Array) -> Course:
    """Squared errors: the loss goes as the square of what the gradient goes with."""
    error = rng.uniform(0.5, 0.8) * rng.standard_normal(steps.size) + _decay(rng, steps)
    return Course(np.exp(2 * error), np.exp(error + 0.2 * rng.standard_normal(steps.size)))


def _random_model(rng: Rng, steps: Array) -> Course:
    hill = np.log(1.0 + rng.uniform(2, 8) * np.exp(-((steps - 15) ** 2) / 200))
    return _course(rng, np.log(2.5 + 8.3 * np.exp(-steps / 25)), hill, 0.08, 0.3)


def _adapter(rng: Rng, steps: Array) -> Course:
    """The second factor starts at 0: gradients grow twentyfold within the warm-up."""
    growth = math.log(20.0) * np.minimum(steps / rng.uniform(15, 80), 1.0)
    return _course(rng, _decay(rng, steps), growth, 0.1, 0.3)


def _near_the_limit(rng: Rng, steps: Array) -> Course:
    """fp16 with activations near the limit that wander and go nowhere."""
    course, drift = _start_up(rng, steps), np.zeros(steps.size)
    for i in range(1, steps.size):
        drift[i] = 0.95 * drift[i - 1] + 0.02 * rng.standard_normal()
    course.bits = rng.choice([4.0, 2.2, 1.3, 0.8]) + drift + 0.3 * np.abs(rng.standard_normal(steps.size))
    return course


def _last_batches(rng: Rng, steps: Array) -> Course:
    """The last batch of every epoch holds one row."""
    last = steps % int(rng.integers(30, 200)) == 0
    noise = np.where(last, 0.7, 0.1) * rng.standard_normal(steps.size)
    return _course(rng, _decay(rng, steps) + 0.6 * noise, noise + np.where(last, 0.8, 0.0), 0.05, 0.2)


def _by_length(rng: Rng, steps: Array) -> Course:
    """Sorted by length within an epoch: a saw-tooth."""
    tooth = (steps % int(rng.integers(40, 300))) / 300
    return _course(rng, _decay(rng, steps) - 0.6 * tooth, -1.6 * tooth, 0.1, 0.3)


def _sources(rng: Rng, steps: Array) -> Course:
    level = _levels(rng, steps, (-0.4, 0.0, 0.4, 0.7), int(rng.integers(20, 80)))
    return _course(rng, _decay(rng, steps) + level, 0.8 * level, 0.12, 0.3)


FAMILIES: dict[str, Callable[[Rng, Array], Course]] = {
    "plain": _base,
    "fp16 start-up": _start_up,
    "large loss scale": _large_scale,
    "scaler begins anew": _scaler_restart,
    "fp16 near the limit": _near_the_limit,
    "rare rows": _rare_rows,
    "hard batches": _hard_batches,
    "long rows": _long_rows,
    "warm-up": _warm_up,
    "restarts": _restart,
    "epochs": _epochs,
    "last batches": _last_batches,
    "masked rows": _masked,
    "curriculum": _curriculum,
    "sources": _sources,
    "sorted by length": _by_length,
    "tiny batches": _tiny_batches,
    "noisier later": _noisier,
    "experts": _experts,
    "Student's t": _student,
    "log-normal": _log_normal,
    "Pareto": _pareto,
    "easy and hard": _easy_and_hard,
    "memorised": _memorised,
    "reinforcement": _reinforcement,
    "preference": _preference,
    "regression": _regression,
    "cyclic norm": _cyclic,
    "slow growth": _slow_growth,
    "drifting": _drifting,
    "new head": _new_head,
    "random model": _random_model,
    "adapter": _adapter,
}


def healthy_run(family: str, seed: int, num_steps: int) -> list[Reading]:
    """The Readings of a run, the tries that overflowed included."""
    rng = np.random.Generator(np.random.PCG64([seed, list(FAMILIES).index(family)]))
    course = FAMILIES[family](rng, np.arange(num_steps, dtype=np.float64))
    ratio = 3e-4 * np.exp(0.3 * rng.standard_normal(num_steps))
    supervised = rng.integers(20, 500, num_steps) if course.supervised is None else course.supervised
    made, scale, good = list[Reading](), course.first_scale, 0
    for i in range(num_steps):
        if i == course.scaler_restarts_at:
            scale = course.first_scale
        limit = course.needed_scale * 2.0 ** (0.3 * rng.standard_normal())
        warm = min(1.0, (i + 1) / course.warm_up)

        def reading(norm: float, i: int = i, scale: float | None = scale, warm: float = warm) -> Reading:
            bits = None if course.bits is None else float(course.bits[i])
            return Reading(
                step=i + 1,
                loss=float(course.loss[i]),
                grad_norm=norm,
                lr=1e-5 * warm,
                supervised_tokens=int(supervised[i]),
                loss_scale=scale,
                headroom_bits=bits,
                amax={} if bits is None else {"layers.1.mlp.down_proj": 65504.0 / 2.0**bits},
                update_ratio=float(ratio[i] * warm),
                changed_fraction=0.9,
            )

        while scale is not None and scale > limit:
            made.append(reading(math.inf, scale=scale))
            scale, good = scale / 2, 0
        made.append(reading(float(course.norm[i]), scale=scale))
        good += 1
        if scale is not None and good >= course.growth_steps:
            scale, good = scale * 2, 0
    return made
