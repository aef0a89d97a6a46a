"""Loss spike: the loss is finite but far above all of the recent past.

What it sees:
    ln(loss) against the window of committed steps: above the median by `factor` and by `num_sigmas`
    robust standard deviations, above the largest of the last `recent_steps` by `recent_factor`, and
    above the median by `min_rise`. The first `min_steps` steps are never judged; neither is a loss that
    is 0 or negative (reinforcement learning).

Why it is bad:
    A spike is a toxic batch or the first step of a divergence. Its gradient fills Adam's moments for
    hundreds of steps. The batch is refused and given up. A change of level that lasts is not a fault:
    after `max_vetoes_in_a_row` refusals the next such step is reported and passes.

Example:
    losses around 1.8 (1.6 to 2.1), then 9.4: above 1.8 * 2 and above 2.1 * 1.5: refused

What to do:
    Look at the rows of the batch. If many batches spike: a smaller learning rate, a longer warm-up.

Source:
    Chowdhery et al. 2022, "PaLM", section 5.1: spikes went away when the batches around them were
    skipped. Rousseeuw & Croux 1993 for the robust sigma.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from finitune.core.codes import Code, Text
from finitune.core.robust import History
from finitune.core.types import Finding, Reading, Severity
from finitune.detectors._checks import above, at_least
from finitune.detectors._outlier import Rule, outlier

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

    factor: float = 2.0
    """At least this many times the median."""
    num_sigmas: float = 8.0
    """At least this many robust standard deviations of ln(loss) above the median."""
    min_rise: float = 0.5
    """At least this much above the median, in the loss's unit (nats): 0.02 to 0.1 harms nobody."""
    recent_factor: float = 1.5
    """At least this many times the largest of the last ``recent_steps`` losses."""
    recent_steps: int = 64
    """How many committed steps count as recent."""
    min_steps: int = 20
    """Committed steps before anything is judged."""
    max_vetoes_in_a_row: int = 3
    """After this many refused batches in a row a spike is reported but passes."""

    def __post_init__(self) -> None:
        above("factor", self.factor, 1.0)
        above("num_sigmas", self.num_sigmas, 0.0)
        at_least("min_rise", self.min_rise, 0.0)
        at_least("recent_factor", self.recent_factor, 1.0)
        at_least("recent_steps", self.recent_steps, 1)
        at_least("min_steps", self.min_steps, 2)
        at_least("max_vetoes_in_a_row", self.max_vetoes_in_a_row, 0)


def detect(history: History, reading: Reading, config: Config) -> Finding | None:
    """A veto for a spike; None for a loss that is not finite (``non_finite`` judges those) or not positive."""
    if not math.isfinite(reading.grad_norm):
        return None
    rule = Rule(config.min_steps, config.num_sigmas, config.factor, config.recent_steps, config.recent_factor)
    found = outlier(history.log_loss, reading.loss, rule)
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
