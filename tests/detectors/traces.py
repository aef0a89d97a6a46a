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
        if finding is not None and finding.veto:
            history.aborted()
        else:
            history.committed(
                reading.loss,
                reading.grad_norm,
                changed_fraction=reading.changed_fraction,
                headroom_bits=reading.headroom_bits,
            )
    return said


def of(module: ModuleType) -> Callable[[History, Reading], Finding | None]:
    """The detector with its defaults."""
    config = module.Config()
    return lambda history, reading: module.detect(history, reading, config)


def spoiled(at: int, num_after: int = 1, **changes: object) -> list[Reading]:
    """A healthy trace of 60 steps whose steps ``at`` .. ``at + num_after - 1`` (1-based) are changed."""
    trace = healthy("fine-tuning", seed=1, num_steps=60)
    return [replace(r, **changes) if at <= r.step < at + num_after else r for r in trace]  # type: ignore[arg-type]


FAULTS: dict[str, Callable[[], list[Reading]]] = {
    "non_finite": lambda: spoiled(30, loss=math.nan, grad_norm=math.nan),
    "loss_spike": lambda: spoiled(30, loss=20.0),
    "gradient_explosion": lambda: spoiled(30, grad_norm=100.0),
    "scaler_collapse": lambda: spoiled(30, loss_scale=0.5),
    "headroom": lambda: spoiled(30, headroom_bits=0.2),
    "stalled_update": lambda: spoiled(30, 10, changed_fraction=0.001),
    "divergence": lambda: spoiled(15, 40, loss=11.0, grad_norm=0.5),
    "nothing_to_train": lambda: spoiled(30, supervised_tokens=0),
}
"""A trace on which the detector of that name must speak."""
