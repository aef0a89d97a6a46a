"""Divergence: the loss is finite, but far above where it began, and stays there.

What it sees:
    Every one of the last `window_steps` committed losses, and this one, is above `factor` times the first
    loss of the run and at least `min_rise` above it.

Why it is bad:
    AdamW in fp32 or bf16 with a far too large learning rate never makes a NaN: the model is destroyed and
    trains on at the level of guessing. It is a warning and not a veto: no single step is at fault, a
    refusal would not bring the model back, and the first loss may have been an easy batch.

Example:
    first loss 2.4; losses 7.1, 7.3, 7.0, ... for 32 steps (guessing among 49152 tokens is ln 49152 = 10.8)

What to do:
    Start again, or from a checkpoint before the rise, with a tenth of the learning rate and a warm-up. Do
    not wait for it to come back: it rarely does.

Source:
    Measured: AdamW at learning rates 0.3 to 3 on a small Llama in fp32 and bf16 ends at losses up to 1137
    and is never NaN. Wortsman et al. 2023, "Small-scale proxies for large-scale Transformer training
    instabilities".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from finitune.core.codes import Code, Text
from finitune.core.robust import History, bounded_exp
from finitune.core.types import Finding, Reading, Severity
from finitune.detectors._checks import above, at_least

DIVERGENCE = Code(
    "OPT002",
    Severity.WARNING,
    Text(
        "the run has diverged",
        "The loss is {loss} at step {step}; it began at {first_loss}, and none of the last {count} was below {lowest}.",
        "The model has lost what it knew, mostly by a learning rate far too large. In fp32 and bf16 this makes no NaN, "
        "so the run would go on for ever.",
        (
            "start again with a tenth of the learning_rate and warmup_ratio: 0.05",
            "go back to a checkpoint from before the rise",
            "if the first batches were just easy: ignore this, or raise guard.detectors.divergence.factor",
        ),
    ),
    Text(
        "训练已发散",
        "第 {step} 步的损失为 {loss}；起始为 {first_loss}，最近 {count} 步没有一步低于 {lowest}。",
        "模型已丢失原有的能力，多半是学习率过大。在 fp32 和 bf16 中这不会产生 NaN，训练会一直进行下去。",
        (
            "以十分之一的 learning_rate 和 warmup_ratio: 0.05 重新开始",
            "回到损失上升之前的检查点",
            "若只是最初的数据较容易：忽略，或增大 guard.detectors.divergence.factor",
        ),
    ),
)

CODES = (DIVERGENCE,)


@dataclass(frozen=True)
class Config:
    """Limits of a divergence."""

    factor: float = 2.0
    """How many times the first loss."""
    min_rise: float = 1.0
    """How far above the first loss at least, in the loss's unit (nats)."""
    window_steps: int = 32
    """How many committed losses in a row must be that high."""

    def __post_init__(self) -> None:
        above("factor", self.factor, 1.0)
        at_least("min_rise", self.min_rise, 0.0)
        at_least("window_steps", self.window_steps, 1)


def detect(history: History, reading: Reading, config: Config) -> Finding | None:
    """A warning, never a veto; None where losses are not positive or the window is not full."""
    if not (math.isfinite(reading.loss) and history.first_loss > 0) or len(history.log_loss) < config.window_steps:
        return None
    lowest = bounded_exp(min(list(history.log_loss)[-config.window_steps :]))
    limit = max(config.factor * history.first_loss, history.first_loss + config.min_rise)
    if min(lowest, reading.loss) <= limit:
        return None
    return DIVERGENCE.find(
        step=reading.step,
        loss=reading.loss,
        first_loss=history.first_loss,
        lowest=lowest,
        count=config.window_steps,
    )
