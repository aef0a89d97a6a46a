"""Nothing to train: no token of this step is supervised.

What it sees:
    The number of tokens that count in the loss, over all micro-batches of the step. Where it was not
    measured (a parsed log), nothing is said.

Why it is bad:
    The mean over no tokens is 0 / 0: the loss is NaN although every gradient is exactly 0, and the run
    looks broken. An update with a zero gradient still moves the weights by momentum and weight decay. So
    the step is refused, and the weights stay as they are. One such batch is harmless; many mean that the
    data is not what it seems.

Example:
    the answers were cut off by max_length: all labels are masked, loss nan, gradient norm 0

What to do:
    A larger max_length; check the format of the data, and that assistant turns are present.

Source:
    torch.nn.CrossEntropyLoss: with reduction "mean" and all targets ignored the result is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

from finitune.core.codes import Code, Text
from finitune.core.robust import History
from finitune.core.types import Finding, Reading, Severity

NOTHING_TO_TRAIN = Code(
    "DAT100",
    Severity.WARNING,
    Text(
        "no token of the step is supervised",
        "Step {step} has {tokens} tokens, but none of them counts in the loss.",
        "The loss over nothing is NaN, while every gradient is 0. The step was refused; the weights did not move.",
        (
            "raise max_length: long prompts push the answer out",
            "check with `finitune check` that the rows have answers in the expected format",
        ),
    ),
    Text(
        "该步没有任何受监督的词元",
        "第 {step} 步有 {tokens} 个词元，但没有一个计入损失。",
        "对空集求平均的损失是 NaN，而所有梯度都为 0。该步已被拒绝，权重没有变化。",
        (
            "增大 max_length：过长的提示会把回答挤掉",
            "用 `finitune check` 检查各行是否含有格式正确的回答",
        ),
    ),
)

CODES = (NOTHING_TO_TRAIN,)


@dataclass(frozen=True)
class Config:
    """No settings."""


def detect(history: History, reading: Reading, config: Config) -> Finding | None:  # noqa: ARG001
    """A veto for a step without supervised tokens."""
    if reading.supervised_tokens != 0:
        return None
    return NOTHING_TO_TRAIN.find(veto=True, step=reading.step, tokens=reading.tokens)
