"""Nothing supervised: no token of the step is to be learnt, so the mean loss is 0 / 0.

What it sees:
    The count of supervised tokens of the step is 0. The loss is then NaN (or 0.0 where a trainer hides NaN) while
    every gradient is exactly 0. Or one micro-batch of several has no target: its cross entropy is NaN over finite
    logits, and the mean over the micro-batches with it.

Why it is bad:
    It is harmless to the weights, and it is data that is paid for and never learnt from: the answer was cut off, the
    template did not match, or the answer is empty. It comes back with the same rows in every epoch.

Example:
    step 120: loss nan, gradient norm 0.0, 0 of 128 tokens supervised; the weights stay as they are

What to do:
    Skip the step; nothing else. Then look at the rows: with data.truncation: truncate_prompt the prompt gives way and
    the answer stays; check that the chat template of the recipe is the one of the model.

Source:
    https://github.com/huggingface/trl/issues/6668 , https://github.com/MakazhanAlpamys/Soup/issues/532 (one stack
    made NaN gradients of it), https://github.com/ymcui/Chinese-LLaMA-Alpaca-2/issues/424
"""

from __future__ import annotations

import math

from finitune.core.codes import Code, Text
from finitune.core.types import Severity
from finitune.engine.case import Case
from finitune.engine.causes import _signs as signs
from finitune.engine.causes._signs import shown
from finitune.engine.weight import Reasons, Weight

CAUSE = Code(
    "DAT400",
    Severity.WARNING,
    Text(
        "cause: nothing in the step is supervised",
        "Of {tokens} tokens in step {step}, {supervised} are to be learnt; the mean loss over none of them is {loss}. "
        "The gradient norm is {grad_norm}. Rows without a target: {rows}.",
        "A mean over 0 tokens is 0 / 0. Its gradient is 0, so no weight is harmed, but the rows teach nothing: their "
        "answers were cut off, are empty, or were not found by the template.",
        (
            "data.truncation: truncate_prompt keeps the answer of a long row; a larger data.max_length keeps both",
            "check that the chat template fits the model: the answer must be found where the template puts it",
            "in a script: drop rows whose labels are all -100 before batching, and count labels != -100 in every step",
        ),
    ),
    Text(
        "原因：该步没有任何受监督的 token",
        "第 {step} 步的 {tokens} 个 token 中有 {supervised} 个需要学习；对它们求平均得到损失 {loss}。梯度范数为 "
        "{grad_norm}。没有目标的数据行：{rows}。",
        "对 0 个 token 求平均就是 0 / 0。其梯度为 0，权重不会受损，但这些数据什么也没教：答案被截掉、为空，"
        "或模板没有匹配到。",
        (
            "data.truncation: truncate_prompt 会保留长数据行的答案；增大 data.max_length 则两者都保留",
            "检查聊天模板是否与模型相符：答案必须位于模板所放的位置",
            "在脚本中：组批之前去掉标签全为 -100 的数据行，并在每一步统计 labels != -100 的个数",
        ),
    ),
)
CODES = (CAUSE,)
FAULT_CLASS = "A"
REMEDIES = ("skip_rows", "drop_batch")


def weigh(case: Case) -> Weight | None:
    """Named by the count, or by a cross entropy that is NaN over finite logits: one micro-batch has no target."""
    reading, micro = case.reading, signs.empty_micro(case)
    reasons = Reasons()
    # A mean over the tokens of each micro-batch has no value where one of them has no target.
    empty = _empty_among_others(case) and not math.isfinite(reading.loss) and not case.bad("scan_state")
    reasons.proof(micro is not None, "localised", 0.9)
    reasons.hint(empty, "supervised_tokens", 0.4)
    reasons.proof(case.bad("supervised_tokens"), "supervised_tokens", 0.95)
    reasons.proof(reading.supervised_tokens == 0, "facts", 0.9)
    reasons.hint(reading.grad_norm == 0.0 and not math.isfinite(reading.loss), "trigger", 0.3)
    reasons.against(case.good("supervised_tokens") and micro is None, "supervised_tokens", 0.05)
    reasons.against(case.bad("scan_state"), "scan_state", 0.6)
    rows = signs.strings(case.number("supervised_tokens", "empty_rows", ()))
    counted = case.number("supervised_tokens", "supervised", reading.supervised_tokens)
    return reasons.weight(
        supervised=shown(counted) if micro is None else f"0 (micro {micro + 1})",
        tokens=shown(case.number("supervised_tokens", "tokens", reading.tokens)),
        step=reading.step,
        loss=reading.loss,
        grad_norm=reading.grad_norm,
        rows=signs.listed(rows),
    )


def _empty_among_others(case: Case) -> bool:
    return case.good("supervised_tokens") and bool(signs.empty_micros(case))
