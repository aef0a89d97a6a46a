"""fp32 weights: the trainable fp16 weights, and their moments, become fp32; what is frozen stays half.

What it does:
    Swaps the storage of each trainable fp16 weight for its values in fp32. They are the same numbers, and the optimizer
    holds the same parameters. A loss scaler can unscale their gradients then, and Adam's eps exists.

What it costs:
    Two more bytes for each trainable weight, and four for its two moments. No data, no progress.

When it is taken back:
    It stays. Where not even the first step can be computed with it, it is taken back, to the very bits of before.

Source:
    https://github.com/huggingface/diffusers/pull/6119 (adapters in fp32) , Micikevicius et al. 2018, "Mixed precision
    training" (arXiv:1710.03740), section 3.1: a master copy of the weights in fp32
"""

from __future__ import annotations

from collections.abc import Iterable

from finitune.core.incident import Cause, Safety, Words
from finitune.engine.case import Case
from finitune.engine.codes_half import HALF_UNDER_SCALER
from finitune.engine.conditions import Conditions
from finitune.engine.plan import Plan

SAFETY = Safety.SAFE
SAYS = Words(
    "{count} trainable fp16 weights and their moments are fp32 from now on, with the same values.",
    "从现在起 {count} 个可训练的 fp16 权重及其矩为 fp32，数值不变。",
)
ADVICE = Words(
    "cast what is trained to fp32 before the optimizer is made (p.data = p.data.float()); peft does with "
    "autocast_adapter_dtype=True",
    "在创建优化器之前把要训练的权重转为 fp32（p.data = p.data.float()）；peft 设 autocast_adapter_dtype=True 即可",
)


def plans(case: Case, cause: Cause, now: Conditions) -> Iterable[Plan]:  # noqa: ARG001
    """Before the first update only, where a scaler refuses: later a cast is a matter of the run's precision."""
    count = case.finding.data.get("count")
    if case.finding.code == HALF_UNDER_SCALER.code and case.has_half_weights:
        yield Plan("fp32_weights", Safety.SAFE, now, data={"count": count})
