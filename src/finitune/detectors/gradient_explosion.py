"""Gradient explosion: the gradient norm is finite but far above all of the recent past.

What it sees:
    ln(gradient norm before clipping, loss scale divided out) against the committed steps. The upper tail is learnt
    from the run: its scale from the highest eighth of the last 128 norms, its record from the last 4096. A norm is an
    explosion where a step of this run is so high with a probability below `chance` - or `joint_chance` where the
    loss, too, is `loss_factor` times its median, `loss_rise` above it and above everything seen - and it is above the
    median by `factor`. The first `min_steps` steps are never judged. In a run whose losses are of either sign (policy
    gradients) the norm is a product of an advantage and a ratio of probabilities: a tail as heavy as the run itself
    has shown is believed in, and the loss is not asked.

Why it is bad:
    Clipping bounds the length of the update, not its direction, and Adam's second moment remembers the
    outlier for about 1 / (1 - beta2) steps. It is often the last finite step before NaN. The batch is
    refused and given up; after `max_vetoes_in_a_row` refusals the next such step is reported and passes.

Example:
    norms around 1.1 (0.5 to 2.6), then 900: refused. A long row with 20: taken, clipped

What to do:
    Look at the rows of the batch. Without clipping: max_grad_norm: 1.0. If it grows step by step: a
    smaller learning rate.

Source:
    Pascanu, Mikolov & Bengio 2013, "On the difficulty of training recurrent neural networks", section 2;
    Huang et al. 2025, "SPAM", for outliers that stay in Adam's moments; Hill 1975 for the scale of a tail. Measured on
    33 families of healthy runs: 6 findings in 1,190,000 steps, 3 of which a chance of 1e-7 has as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from finitune.core.codes import Code, Text
from finitune.core.robust import Bounds, History, breaks_record, outlier
from finitune.core.types import Finding, Reading, Severity
from finitune.detectors._checks import above, at_least, probability

GRADIENT_EXPLOSION = Code(
    "NUM011",
    Severity.WARNING,
    Text(
        "the gradient exploded",
        "The gradient norm is {grad_norm} at step {step}, {times} times the median {median} (limit {limit}).",
        "Clipping would shorten such a gradient but keep its direction, and the optimizer's second moment would "
        "remember it. A step that is refused for it leaves no trace; a level that stays is let through.",
        (
            "look at the rows of this batch",
            "set max_grad_norm: 1.0 if there is no clipping",
            "if it grows step by step: a smaller learning_rate or more warmup_ratio",
            "if your data really varies so much: raise guard.detectors.gradient_explosion.factor",
        ),
    ),
    Text(
        "梯度爆炸",
        "第 {step} 步的梯度范数为 {grad_norm}，是中位数 {median} 的 {times} 倍（上限 {limit}）。",
        "裁剪只会缩短这样的梯度，方向不变，优化器的二阶动量也会记住它。因此被拒绝的步不留任何痕迹；"
        "若新的水平持续，则予以放行。",
        (
            "检查该批数据",
            "若未裁剪梯度：设置 max_grad_norm: 1.0",
            "若逐步增大：减小 learning_rate 或增大 warmup_ratio",
            "若数据本来就差异很大：增大 guard.detectors.gradient_explosion.factor",
        ),
    ),
)

CODES = (GRADIENT_EXPLOSION,)


@dataclass(frozen=True)
class Config:
    """Limits of a gradient explosion."""

    factor: float = 30.0
    """At least this many times the median: rare rows have 20 times, and a clipped step on them does no harm."""
    chance: float = 1e-6
    """Probability of such a norm in a step, by the run's own tail, below which it is no matter of chance."""
    joint_chance: float = 1e-5
    """The same where the loss stands out as well."""
    loss_factor: float = 3.0
    """A loss stands out from this many times its median on."""
    loss_rise: float = 3.0
    """And from so much above its median on, in the loss's unit (nats)."""
    prior_scale: float = 0.2
    """Scale of the tail of ln(norm) that is assumed before the run has shown one."""
    min_steps: int = 20
    """Committed steps before anything is judged."""
    max_vetoes_in_a_row: int = 3
    """After this many refused batches in a row an explosion is reported but passes."""

    def __post_init__(self) -> None:
        above("factor", self.factor, 1.0)
        probability("chance", self.chance)
        probability("joint_chance", self.joint_chance)
        above("loss_factor", self.loss_factor, 1.0)
        at_least("loss_rise", self.loss_rise, 0.0)
        above("prior_scale", self.prior_scale, 0.0)
        at_least("min_steps", self.min_steps, 2)
        at_least("max_vetoes_in_a_row", self.max_vetoes_in_a_row, 0)


def detect(history: History, reading: Reading, config: Config) -> Finding | None:
    """A veto for an explosion; None for a loss or norm that is not finite (``non_finite`` judges those)."""
    if not math.isfinite(reading.loss) or len(history.log_grad_norm) < config.min_steps:
        return None
    signed = history.is_signed
    joint = not signed and breaks_record(history.log_loss, reading.loss, config.loss_factor, config.loss_rise)
    chance = max(config.chance, config.joint_chance) if joint else config.chance
    bounds = Bounds(config.factor, chance, config.prior_scale, own_tail=signed)
    found = outlier(history.log_grad_norm, reading.grad_norm, bounds)
    if found is None:
        return None
    return GRADIENT_EXPLOSION.find(
        veto=history.aborts_in_a_row < config.max_vetoes_in_a_row,
        step=reading.step,
        grad_norm=reading.grad_norm,
        median=found.median,
        limit=found.limit,
        times=found.times,
    )
