"""Stop token: the token that ends an answer is never to be learnt.

What it sees:
    A check counted the rows whose last supervised token is the one that stops generation, and found none or few. It
    is the check that names it: nothing fails in such a run.

Why it is bad:
    The loss is fine, and the model never stops talking, or it stops at random. Padding with the end token and masking
    all padding masks the end as well.

Example:
    pad_token = eos_token, labels of padding masked: 0 % of 5000 rows supervise the end

What to do:
    A padding token of its own; supervise the token that ends a turn; the chat template of the model.

Source:
    https://github.com/unslothai/unsloth/issues/416 , https://github.com/InternLM/xtuner/issues/658 ,
    https://github.com/huggingface/trl/issues/1623
"""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity
from finitune.engine.case import Case
from finitune.engine.causes import _signs as signs
from finitune.engine.weight import Reasons, Weight

CAUSE = Code(
    "DAT402",
    Severity.ERROR,
    Text(
        "cause: the end of an answer is never learnt",
        "{share} of {rows} rows supervise the token that ends an answer.",
        "A model that never sees the end supervised does not learn to stop. Masking all padding does it where "
        "padding and "
        "end are the same token.",
        (
            "give padding a token of its own",
            "use the model's own chat template, and supervise the token that ends a turn",
            "in a script: mask labels by the attention mask or by position, never by labels == eos",
        ),
    ),
    Text(
        "原因：答案的结尾从未被学习",
        "{rows} 行中有 {share} 对结束答案的 token 进行监督。",
        "从未见过结尾受监督的模型学不会停下来。若填充与结尾是同一个 token，屏蔽所有填充就会造成这种情况。",
        (
            "为填充使用单独的 token",
            "使用模型自己的聊天模板，并监督结束一轮的 token",
            "在脚本中：按注意力掩码或位置屏蔽标签，不要按 labels == eos",
        ),
    ),
)
CODES = (CAUSE,)
FAULT_CLASS = "P"
REMEDIES = ()


def weigh(case: Case) -> Weight | None:
    """Named by the check that counted."""
    reasons = Reasons()
    reasons.proof(signs.is_told(case, CAUSE.code), "trigger", 0.9)
    data = case.finding.data
    return reasons.weight(case.finding.where, share=signs.shown(data.get("share")), rows=signs.shown(data.get("rows")))
