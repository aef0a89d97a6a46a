"""Replaced loss: the loss is exactly 0 where it was not before, and no gradient comes with it.

What it sees:
    A loss of 0 to the last bit and a gradient norm of 0, over supervised tokens, after at least `min_steps` steps with
    a median loss above `min_loss`. A loss that has been learnt away comes down slowly; one that falls to 0 at once was
    put there. Only the first one is told: a run whose losses may be 0 or negative (policy gradients) is none of these.

Why it is bad:
    Scripts replace a NaN by zeros, or by nan_to_num, to keep going, and logs show a NaN as 0.0. The failure is then
    invisible, its rows teach nothing, and momentum and weight decay move the weights all the same. In a distributed
    run a loss without a graph makes the other processes wait for ever.

Example:
    step 4: loss 2.31; step 5: loss 0.0, grad_norm 0.0, 412 supervised tokens; step 6: loss 2.29

What to do:
    Take the replacement out, so that the true loss is seen and its cause found: torch.zeros, nan_to_num, an if on
    isnan, logging_nan_inf_filter.

Source:
    https://github.com/huggingface/trl/issues/6702 , https://github.com/ecmwf/WeatherGenerator/issues/2724
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from finitune.core.codes import Code, Text
from finitune.core.robust import History
from finitune.core.types import Finding, Reading, Severity
from finitune.detectors._checks import above, at_least

REPLACED_LOSS = Code(
    "NUM130",
    Severity.WARNING,
    Text(
        "the loss is exactly 0: it was replaced",
        "Step {step}: the loss is 0 to the last bit and the gradient is 0, over {supervised} supervised tokens; the "
        "median loss so far is {median}.",
        "A cross entropy does not fall to 0 from one step to the next. A NaN or inf that is replaced by zeros hides "
        "the failure, and the rows of the step teach nothing.",
        (
            "take out what replaces the loss (torch.zeros, nan_to_num, an if on isnan): the guard refuses such steps "
            "itself, and finds their cause",
            "in logs of transformers: logging_nan_inf_filter=False shows the true value",
        ),
    ),
    Text(
        "损失恰好为 0：它被替换了",
        "第 {step} 步：{supervised} 个受监督的词元上损失精确为 0，梯度也为 0；此前损失的中位数为 {median}。",
        "交叉熵不会在一步之间降到 0。用零替换 NaN 或 inf 会掩盖故障，而该步的数据行什么也教不了。",
        (
            "去掉替换损失的代码（torch.zeros、nan_to_num、对 isnan 的判断）：守护器自己会拒绝这样的步并查找原因",
            "在 transformers 的日志中：logging_nan_inf_filter=False 会显示真实值",
        ),
    ),
)

CODES = (REPLACED_LOSS,)


@dataclass(frozen=True)
class Config:
    """When a loss of 0 is no loss."""

    min_steps: int = 4
    """Committed steps before it is judged."""
    min_loss: float = 0.01
    """Median loss so far; below it a loss may come out as 0 by rounding."""

    def __post_init__(self) -> None:
        at_least("min_steps", self.min_steps, 1)
        above("min_loss", self.min_loss, 0.0)


def detect(history: History, reading: Reading, config: Config) -> Finding | None:
    """A warning, never a veto: the step moves nothing by itself."""
    nothing = reading.loss == 0.0 and reading.grad_norm == 0.0
    # Where losses of 0 or below come about by themselves (advantages that are all equal), one more says nothing.
    if not nothing or history.num_not_positive or reading.supervised_tokens == 0:
        return None
    if len(history.log_loss) < config.min_steps:
        return None
    median = math.exp(min(history.log_loss.median(), 700.0))
    if not median > config.min_loss:
        return None
    tokens = "-" if reading.supervised_tokens is None else reading.supervised_tokens
    return REPLACED_LOSS.find(step=reading.step, supervised=tokens, median=median)
