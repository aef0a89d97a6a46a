"""Loss spike: the loss is finite but far above all of the recent past.

What it sees:
    ln(loss) against the committed steps. The upper tail is learnt from the run: its scale from the highest eighth of
    the last 128 losses, its record from the last 4096. A loss is a spike where a step of this run is so high with a
    probability below `chance` - or `joint_chance` where the gradient norm, too, is `norm_factor` times its median and
    above everything seen - and it is above the median by `factor` and by `min_rise`. The first `min_steps` steps
    are never judged; neither is a loss that is 0 or negative (reinforcement learning).

Why it is bad:
    A spike is a toxic batch or the first step of a divergence. Its gradient fills Adam's moments for hundreds of
    steps. The batch is refused and given up. Rows that are rare or hard are none: a clipped step on them does no
    harm, and the run shows how often they come. A change of level that lasts is not a fault either: after
    `max_vetoes_in_a_row` refusals the next such step is reported and passes.

Example:
    losses around 1.8 (1.6 to 2.1), then 60: refused. Losses from 0.2 to 9 with a heavy tail, then 60: taken

What to do:
    Look at the rows of the batch. If many batches spike: a smaller learning rate, a longer warm-up.

Source:
    Chowdhery et al. 2022, "PaLM", section 5.1: spikes went away when the batches around them were
    skipped. Hill 1975 for the scale of a tail. Measured on 33 families of healthy runs with heavy tails, rare rows
    and changes of level: about 3 refusals in 1,000,000 steps; 8 robust standard deviations and twice the median
    refused 100 times as many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from finitune.core.codes import Code, Text
from finitune.core.robust import Bounds, History, breaks_record, outlier
from finitune.core.types import Finding, Reading, Severity
from finitune.detectors._checks import above, at_least, probability

LOSS_SPIKE = Code(
    "NUM010",
    Severity.WARNING,
    Text(
        "the loss spiked",
        "The loss is {loss} at step {step}, {times} times the median {median} (limit {limit}).",
        "One such update can undo many good ones: its gradient stays in the optimizer's moments. A step that is "
        "refused for it leaves no trace; a level that stays is let through.",
        (
            "look at the rows of this batch: another language, a broken or repeated text?",
            "if spikes come often: a smaller learning_rate or more warmup_ratio",
            "if your data really varies so much: raise guard.detectors.loss_spike.factor",
        ),
    ),
    Text(
        "损失突增",
        "第 {step} 步的损失为 {loss}，是中位数 {median} 的 {times} 倍（上限 {limit}）。",
        "一次这样的更新可能抵消许多正常更新：其梯度会留在优化器的动量中。因此被拒绝的步不留任何痕迹；"
        "若新的水平持续，则予以放行。",
        (
            "检查该批数据：是否为其他语言、损坏或重复的文本？",
            "若经常突增：减小 learning_rate 或增大 warmup_ratio",
            "若数据本来就差异很大：增大 guard.detectors.loss_spike.factor",
        ),
    ),
)

CODES = (LOSS_SPIKE,)


@dataclass(frozen=True)
class Config:
    """Limits of a loss spike."""

    factor: float = 3.0
    """At least this many times the highest median of the last 4096 steps: a row that was not learnt by heart as the
    others has the loss that all had at the start."""
    min_rise: float = 3.0
    """At least this much above the median, in the loss's unit (nats): a rare row has as much, and harms nobody."""
    chance: float = 3e-7
    """Probability of such a loss in a step, by the run's own tail, below which it is no matter of chance."""
    joint_chance: float = 1e-5
    """The same where the gradient norm stands out as well."""
    norm_factor: float = 30.0
    """A gradient norm stands out from this many times its median on."""
    prior_scale: float = 0.2
    """Scale of the tail of ln(loss) that is assumed before the run has shown one."""
    min_steps: int = 20
    """Committed steps before anything is judged."""
    max_vetoes_in_a_row: int = 3
    """After this many refused batches in a row a spike is reported but passes."""

    def __post_init__(self) -> None:
        above("factor", self.factor, 1.0)
        at_least("min_rise", self.min_rise, 0.0)
        probability("chance", self.chance)
        probability("joint_chance", self.joint_chance)
        above("norm_factor", self.norm_factor, 1.0)
        above("prior_scale", self.prior_scale, 0.0)
        at_least("min_steps", self.min_steps, 2)
        at_least("max_vetoes_in_a_row", self.max_vetoes_in_a_row, 0)


def detect(history: History, reading: Reading, config: Config) -> Finding | None:
    """A veto for a spike; None for a loss that is not finite (``non_finite`` judges those) or not positive."""
    if not math.isfinite(reading.grad_norm) or len(history.log_loss) < config.min_steps:
        return None
    if history.is_signed:
        return None
    joint = breaks_record(history.log_grad_norm, reading.grad_norm, config.norm_factor)
    chance = max(config.chance, config.joint_chance) if joint else config.chance
    found = outlier(history.log_loss, reading.loss, Bounds(config.factor, chance, config.prior_scale))
    if found is None or reading.loss - found.median <= config.min_rise:
        return None
    return LOSS_SPIKE.find(
        veto=history.aborts_in_a_row < config.max_vetoes_in_a_row,
        step=reading.step,
        loss=reading.loss,
        median=found.median,
        limit=found.limit,
        times=found.times,
    )
