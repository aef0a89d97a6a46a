"""Healthy training traces, made by rule from a seed, and the loop that shows them to detectors.

A trace is a list of Readings without any fault: whatever a detector says of it is a false alarm. The
families are exaggerated rather than typical.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np

from finitune.core.robust import History
from finitune.core.types import Finding, Reading

NUM_STEPS = 300


@dataclass(frozen=True)
class Shape:
    """Logarithms of a family's loss and gradient norm, step by step, before noise."""

    log_loss: np.ndarray
    log_norm: np.ndarray
    loss_noise: float = 0.1
    norm_noise: float = 0.3


def _decay(steps: np.ndarray) -> np.ndarray:
    return np.log(1.2 + 1.5 * np.exp(-steps / 60))


def _family(name: str, rng: np.random.Generator, steps: np.ndarray) -> Shape:
    flat = np.zeros_like(steps)
    decay = _decay(steps)
    if name == "fine-tuning":
        return Shape(decay, flat)
    if name == "batch of one":
        return Shape(decay, flat, loss_noise=0.4, norm_noise=0.5)
    if name == "log-normal sigma 0.5":
        return Shape(decay, flat, loss_noise=0.5, norm_noise=0.5)
    if name == "warm-up growth":  # LoRA starts with B = 0: gradients grow twentyfold while they warm up
        return Shape(decay, np.log(20.0) * np.minimum(steps / 40, 1.0))
    if name == "new head":  # ten nats at the start, gradients that shrink
        return Shape(np.log(1.5 + 8.5 * np.exp(-steps / 30)), -np.log1p(steps / 10))
    if name == "epoch boundary":
        return Shape(np.log(1.5) - 0.7 * (steps // 100), -0.3 * (steps // 100))
    if name == "memorised":  # losses of 0.01 to 0.1 vary wildly
        return Shape(np.log(0.03) + flat, flat - 2, loss_noise=0.8, norm_noise=0.6)
    if name == "long samples":  # now and then a batch of another length
        long = rng.random(steps.size) < 0.02
        return Shape(decay + 0.35 * long, math.log(2.5) * long)
    if name == "two kinds of rows":  # a minority that the median absolute deviation does not see
        hard = rng.random(steps.size) < 0.25
        return Shape(np.log(0.5) + math.log(3.0) * hard, math.log(3.0) * hard, loss_noise=0.05, norm_noise=0.15)
    if name == "slow growth":
        return Shape(decay, np.log(3.0) * steps / NUM_STEPS)
    raise KeyError(name)


FAMILIES = (
    "fine-tuning",
    "batch of one",
    "log-normal sigma 0.5",
    "warm-up growth",
    "new head",
    "epoch boundary",
    "memorised",
    "long samples",
    "two kinds of rows",
    "slow growth",
)


def healthy(name: str, seed: int, num_steps: int = NUM_STEPS) -> list[Reading]:
    """A trace of the family ``name`` with normal noise on the logarithms."""
    rng = np.random.Generator(np.random.PCG64([seed, FAMILIES.index(name)]))
    shape = _family(name, rng, np.arange(num_steps, dtype=np.float64))
    losses = np.exp(shape.log_loss + shape.loss_noise * rng.standard_normal(num_steps))
    # The norm follows the loss a little, as in life.
    norms = np.exp(shape.log_norm + shape.norm_noise * rng.standard_normal(num_steps))
    bits = 4.0 - 0.5 * np.arange(num_steps) / num_steps + 0.1 * rng.standard_normal(num_steps)
    return [
        Reading(
            step=i + 1,
            loss=float(losses[i]),
            grad_norm=float(norms[i]),
            lr=1e-5 * min(1.0, (i + 1) / 20),
            supervised_tokens=int(rng.integers(20, 500)),
            tokens=600,
            loss_scale=65536.0,
            headroom_bits=float(bits[i]),
            amax={"layers.1.mlp.down_proj": 65504.0 / 2.0 ** float(bits[i])},
            changed_fraction=None if i == 0 else float(rng.uniform(0.7, 1.0)),
        )
        for i in range(num_steps)
    ]


def show(
    readings: Iterable[Reading], detect: Callable[[History, Reading], Finding | None]
) -> list[tuple[int, Finding]]:
    """Run the guard's loop over a trace: (step, finding) for everything said."""
    history, said = History(), []
    for reading in readings:
        finding = detect(history, reading)
        if finding is not None:
            said.append((reading.step, finding))
        if _overflowed(reading):
            history.overflowed()
        elif finding is not None and finding.veto:
            history.aborted()
        else:
            history.commit(reading)
    return said


def _overflowed(reading: Reading) -> bool:
    return reading.loss_scale is not None and math.isfinite(reading.loss) and not math.isfinite(reading.grad_norm)


def of(module: ModuleType) -> Callable[[History, Reading], Finding | None]:
    """The detector with its defaults."""
    config = module.Config()
    return lambda history, reading: module.detect(history, reading, config)


def _level_shift(rng: np.random.Generator, steps: np.ndarray) -> Shape:
    """Every so often other data: harder or easier, and it stays."""
    level = np.repeat(rng.choice([0.0, 0.3, 0.7, 1.0], steps.size // 60 + 1), 60)[: steps.size]
    return Shape(_decay(steps) + 0.8 * level, 1.1 * level)


def _spikes(rng: np.random.Generator, steps: np.ndarray) -> Shape:
    """Single rare rows: far out, and the next batch is as before."""
    rare = (rng.random(steps.size) < 0.02) & (np.roll(rng.random(steps.size), 1) < 0.99)
    return Shape(_decay(steps) + math.log(6.0) * rare, math.log(15.0) * rare)


def _restart(rng: np.random.Generator, steps: np.ndarray) -> Shape:
    """A new warm-up every 100 steps: a small bump of the loss, and the norm settles again."""
    since = steps % 100
    return Shape(_decay(steps) + 0.2 * np.exp(-since / 10), 0.8 * np.exp(-since / 15))


def _curriculum(rng: np.random.Generator, steps: np.ndarray) -> Shape:
    """Sorted by difficulty: loss and norm climb for the whole run."""
    return Shape(np.log(0.8) + np.log(3.5) * steps / steps.size, np.log(4.0) * steps / steps.size, loss_noise=0.15)


def _noise(log_norm_sigma: float, log_loss_sigma: float) -> Callable[[np.random.Generator, np.ndarray], Shape]:
    return lambda _rng, steps: Shape(
        _decay(steps), np.zeros_like(steps), loss_noise=log_loss_sigma, norm_noise=log_norm_sigma
    )


def _heavy(rng: np.random.Generator, steps: np.ndarray) -> Shape:
    """Student's t with 3 degrees of freedom in the logarithm."""
    return Shape(_decay(steps) + 0.1 * rng.standard_t(3, steps.size), 0.25 * rng.standard_t(3, steps.size))


def _slow_noise(rng: np.random.Generator, steps: np.ndarray) -> Shape:
    """Neighbouring steps are alike: an autoregressive norm, as in data sorted by length."""
    drift = np.zeros(steps.size)
    for i in range(1, steps.size):
        drift[i] = 0.9 * drift[i - 1] + 0.15 * rng.standard_normal()
    return Shape(_decay(steps) + 0.3 * drift, drift, norm_noise=0.15)


def _random_model(rng: np.random.Generator, steps: np.ndarray) -> Shape:
    return Shape(np.log(2.5 + 8.3 * np.exp(-steps / 25)), np.log(1.0 + 6.0 * np.exp(-((steps - 15) ** 2) / 200)))


def _sources(rng: np.random.Generator, steps: np.ndarray) -> Shape:
    """Files one after another: every 40 steps another level, some of them three times as hard as others."""
    level = np.repeat(rng.choice([-0.4, 0.0, 0.4, 0.7], steps.size // 40 + 1), 40)[: steps.size]
    return Shape(_decay(steps) + level, 0.8 * level, loss_noise=0.12)


def _long_rows(rng: np.random.Generator, steps: np.ndarray) -> Shape:
    """Runs of long and hard rows, up to ten in a row."""
    hard = np.zeros(steps.size)
    for start in rng.integers(0, steps.size, steps.size // 40):
        hard[start : start + int(rng.integers(1, 11))] = rng.uniform(0.5, 1.0)
    return Shape(_decay(steps) + hard, 1.2 * hard, loss_noise=0.15)


def _small_warm_up(rng: np.random.Generator, steps: np.ndarray) -> Shape:
    return Shape(_decay(steps), np.log(0.2 + np.minimum(steps / 60, 1.0)), norm_noise=0.2)


STRANGE: dict[str, Callable[[np.random.Generator, np.ndarray], Shape]] = {
    "sigma 0.3": _noise(0.3, 0.1),
    "sigma 0.45": _noise(0.45, 0.3),
    "sigma 0.6": _noise(0.6, 0.5),
    "heavy tails": _heavy,
    "slow noise": _slow_noise,
    "level shifts": _level_shift,
    "rare rows": _spikes,
    "restarts": _restart,
    "curriculum": _curriculum,
    "random model": _random_model,
    "small warm-up": _small_warm_up,
    "unsorted sources": _sources,
    "long rows": _long_rows,
}
"""Healthy, but harder to tell from a failure than the families above."""


def strange(name: str, seed: int, num_steps: int = NUM_STEPS) -> list[Reading]:
    """A healthy trace with everything measured: a scale that was searched for, headroom that wanders near the
    limit, ratios that follow a warm-up, and 5 % of steps in which nothing is supervised."""
    rng = np.random.Generator(np.random.PCG64([seed, 1000 + list(STRANGE).index(name)]))
    shape = STRANGE[name](rng, np.arange(num_steps, dtype=np.float64))
    losses = np.exp(shape.log_loss + shape.loss_noise * rng.standard_normal(num_steps))
    norms = np.exp(shape.log_norm + shape.norm_noise * rng.standard_normal(num_steps))
    bits = _wandering_bits(rng, num_steps)
    scale, warm_up, made = 65536.0, int(rng.choice([1, 20, 100, 300])), []
    for i in range(num_steps):
        overflow = i < int(rng.integers(5, 16)) if i < 16 else rng.random() < 0.01
        scale = scale / 2 if overflow else min(65536.0, scale * (2.0 if i % 50 == 0 else 1.0))
        empty = not overflow and rng.random() < 0.05
        made.append(
            Reading(
                step=i + 1,
                loss=math.nan if empty else float(losses[i]),
                grad_norm=math.inf if overflow else 0.0 if empty else float(norms[i]),
                lr=1e-5 * min(1.0, (i + 1) / warm_up),
                supervised_tokens=0 if empty else int(rng.integers(20, 500)),
                loss_scale=scale * 2 if overflow else scale,
                headroom_bits=float(bits[i]),
                amax={f"layers.{k}.mlp.down_proj": 65504.0 / 2.0 ** float(bits[i]) / (1 + k) for k in range(3)},
                update_ratio=float(3e-4 * min(1.0, (i + 1) / 60) * np.exp(0.3 * rng.standard_normal())),
                changed_fraction=float(rng.uniform(0.7, 1.0)),
            )
        )
    return made


def _wandering_bits(rng: np.random.Generator, num_steps: int) -> np.ndarray:
    """Headroom near the limit that goes nowhere: a real model starts at 1.3 bits, with dips of half a bit."""
    level, drift = rng.choice([4.0, 2.2, 1.3, 0.8]), np.zeros(num_steps)
    for i in range(1, num_steps):
        drift[i] = 0.95 * drift[i - 1] + 0.02 * rng.standard_normal()
    return np.asarray(level + drift + 0.3 * np.abs(rng.standard_normal(num_steps)))


def spoiled(at: int, num_after: int = 1, **changes: object) -> list[Reading]:
    """A healthy trace of 60 steps whose steps ``at`` .. ``at + num_after - 1`` (1-based) are changed."""
    trace = healthy("fine-tuning", seed=1, num_steps=60)
    return [replace(r, **changes) if at <= r.step < at + num_after else r for r in trace]  # type: ignore[arg-type]


def sloping_headroom(per_step: float = 0.03) -> list[Reading]:
    """Headroom that falls from 3 bits."""
    trace = healthy("fine-tuning", seed=1, num_steps=120)
    bits = [3.0 - per_step * i for i in range(len(trace))]
    return [
        replace(r, headroom_bits=b, amax={f"model.layers.{k}.mlp.down_proj": 65504.0 / 2.0**b for k in (11, 12, 13)})
        for r, b in zip(trace, bits, strict=True)
    ]


def ramp(rate: float = 1.4, at: int = 60, num_steps: int = 8) -> list[Reading]:
    """A norm that climbs by ``rate`` a step from 1.5 times the highest on."""
    trace = healthy("fine-tuning", seed=1, num_steps=at + num_steps)
    highest = max(r.grad_norm for r in trace[:at])
    return [r if i < at else replace(r, grad_norm=highest * 1.2 * rate ** (i - at)) for i, r in enumerate(trace)]


def falling_scale() -> list[Reading]:
    """Good for 40 steps, then every second try overflows."""
    trace = healthy("fine-tuning", seed=1, num_steps=80)
    return [
        r if i < 40 else replace(r, loss_scale=65536.0 / 2.0 ** ((i - 40) // 2), grad_norm=math.inf if i % 2 else 1.0)
        for i, r in enumerate(trace)
    ]


FAULTS: dict[str, Callable[[], list[Reading]]] = {
    "non_finite": lambda: spoiled(30, loss=math.nan, grad_norm=math.nan),
    "loss_spike": lambda: spoiled(30, loss=200.0),
    "gradient_explosion": lambda: spoiled(30, grad_norm=1000.0),
    "scaler_collapse": lambda: spoiled(30, loss_scale=0.5),
    "headroom": lambda: spoiled(30, headroom_bits=0.2),
    "stalled_update": lambda: spoiled(30, 10, changed_fraction=0.001),
    "divergence": lambda: spoiled(15, 40, loss=11.0, grad_norm=0.5),
    "nothing_to_train": lambda: spoiled(30, supervised_tokens=0),
    "headroom_trend": lambda: sloping_headroom(),
    "gradient_ramp": lambda: ramp(),
    "runaway": lambda: spoiled(30, 30, loss=10.8),
    "scale_trajectory": lambda: falling_scale(),
    "update_ratio": lambda: spoiled(30, 10, update_ratio=0.02),
    "replaced_loss": lambda: spoiled(30, loss=0.0, grad_norm=0.0),
}
"""A trace on which the detector of that name must speak."""
