"""Masked row: a token attends to nothing, or a mask is added twice, and softmax gives NaN.

What it sees:
    The first bad operation is a softmax or an attention kernel in the forward pass. The failure hangs on some rows of
    the batch or on the padding width, not on the precision. A row taken alone, without its padding, would be fine:
    the experiments keep the width.

Why it is bad:
    softmax over a row of -inf is 0 / 0. A NaN in a masked place is not harmless: 0 x NaN is NaN, so it reaches the
    real tokens of the row. finfo.min added twice is -inf in fp16 and bf16.

Example:
    row 3, left-padded under a causal mask: its first tokens may attend to nothing; NaN in eager attention, 0 in sdpa

What to do:
    Pad on the right for training; build the mask so that every query has a key; use a kernel with a safe softmax.

Source:
    https://github.com/pytorch/pytorch/issues/103749 , https://github.com/unslothai/unsloth/pull/9848 ,
    https://github.com/deepspeedai/DeepSpeedExamples/issues/571
"""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.incident import Trigger
from finitune.core.types import Severity
from finitune.engine.case import Case
from finitune.engine.causes import _signs as signs
from finitune.engine.weight import REFUTED, Reasons, Weight

CAUSE = Code(
    "NUM402",
    Severity.ERROR,
    Text(
        "cause: an attention row has nothing to attend to",
        "{where} ({op}) gives NaN from finite input. Rows concerned: {rows}. Changes of the padding that cure it: "
        "{widths}; "
        "the attention in use is {attention}.",
        "A softmax over masked places only is 0 / 0. The NaN spreads from padding to real tokens, as 0 x NaN is NaN.",
        (
            "look at the attention mask of the rows named here: every token needs at least one allowed key",
            "pad on the right while training; left padding with a causal mask leaves rows empty",
            "model.attn_implementation: sdpa, whose softmax is safe in torch 2.5 and later",
            "in a script: mask with torch.finfo(dtype).min once, not with -inf and not twice",
        ),
    ),
    Text(
        "原因：注意力中有一行没有可关注的位置",
        "{where}（{op}）由有限的输入得到 NaN。涉及的数据行：{rows}。能治好它的填充变化：{widths}；所用的注意力为 "
        "{attention}。",
        "只对被屏蔽的位置做 softmax 就是 0 / 0。NaN 会从填充扩散到真正的 token，因为 0 x NaN 仍是 NaN。",
        (
            "检查此处所列数据行的注意力掩码：每个 token 至少要有一个允许的键",
            "训练时在右侧填充；左侧填充加因果掩码会留下空行",
            "model.attn_implementation: sdpa，其 softmax 在 torch 2.5 及以后是安全的",
            "在脚本中：用 torch.finfo(dtype).min 屏蔽一次，不要用 -inf，也不要屏蔽两次",
        ),
    ),
)
CODES = (CAUSE,)
FAULT_CLASS = "E"
REMEDIES = ("safe_softmax", "math_attention", "skip_rows", "drop_batch")


def weigh(case: Case) -> Weight | None:
    """Named where rows, padding or kernel flip a failure that begins in the softmax of a forward pass."""
    if case.trigger not in signs.FAILED or signs.phase(case) != "forward":
        return None
    if not (signs.in_attention(case) or signs.is_softmax(case)):
        return None
    reasons = Reasons()
    reasons.hint(True, "localised", 0.5 if signs.is_softmax(case) else 0.3)
    reasons.proof(case.good("rows"), "rows", 0.7)
    reasons.proof(case.good("padding"), "padding", 0.7)
    reasons.proof(case.good("safe_softmax"), "safe_softmax", 0.7)
    reasons.proof(case.good("math_attention"), "math_attention", 0.4)
    reasons.hint(case.good("known_good_batch"), "known_good_batch", 0.2)
    # fp16 scores may overflow as well; a mask does not care for the range of the activations.
    reasons.against(case.good("fp32") and case.is_half, "fp32", 0.5)
    reasons.against(case.bad("scan_state"), "scan_state", REFUTED)
    reasons.against(case.bad("known_good_batch"), "known_good_batch", 0.6)
    # A mask does not know the weights.
    reasons.against(case.good("older_weights"), "older_weights", 0.4)
    reasons.against(case.good("lower_lr"), "lower_lr", REFUTED)
    reasons.against(case.good("tighter_clip"), "tighter_clip", REFUTED)
    reasons.against(case.trigger is Trigger.OUTLIER, "trigger", 0.3)
    widths = case.number("padding", "widths_good", ())
    return reasons.weight(
        signs.spot(case),
        op=signs.op(case) or "-",
        rows=signs.listed(signs.rows(case)),
        widths=signs.listed(map(str, signs.steps(widths))),
        attention=signs.shown(case.facts.get("attention")),
    )
