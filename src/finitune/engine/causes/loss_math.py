"""Loss math: an operation of the loss has a pole, or an infinite derivative, at a value that this batch holds.

What it sees:
    The first bad operation sits behind the model, in no module of it: sqrt, log, exp, a division or a standard
    deviation. Often the loss is finite and its derivative is not. fp32 does not help; leaving out a row, or another
    batch, does. A deviation that is NaN over finite numbers needs no more: it was taken over a single one.

Why it is bad:
    It waits: an empty span, one sample in a group, a probability of exactly 1. There is no precursor. Masking the
    value after the operation does not help, since the backward pass multiplies 0 by inf.

Example:
    sqrt of a sum over an empty span: loss 2.31, SqrtBackward0 gives NaN, row 2 of 4, in fp32 as well

What to do:
    Put the mask or the clamp before the operation: sqrt(x + eps), exp(clamp(x)), log1mexp for log(1 - exp(x)), a
    floor under a standard deviation. Until then the row is left out.

Source:
    https://github.com/MakazhanAlpamys/Soup/issues/342 , https://github.com/huggingface/trl/issues/3237 ,
    https://github.com/modelscope/ms-swift/issues/8123
"""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity
from finitune.engine.case import Case
from finitune.engine.causes import _signs as signs
from finitune.engine.weight import REFUTED, Reasons, Weight

CAUSE = Code(
    "NUM404",
    Severity.ERROR,
    Text(
        "cause: the loss has a pole at a value in this batch",
        "{op} in the loss ({phase} pass, {where}) makes NaN or inf from finite input; the loss is {loss}. Rows "
        "concerned: "
        "{rows}.",
        "sqrt, log, exp and divisions have no finite value or derivative everywhere. A mask behind them comes too "
        "late: in "
        "the backward pass 0 x inf is NaN.",
        (
            "clamp or mask before {op}: sqrt(x + eps), exp(x.clamp(max=20)), a floor under a standard deviation",
            "in a script: replace values that do not count by harmless ones before the operation (torch.where on its "
            "input)",
            "preference losses: log(1 - exp(x)) as log1mexp, in fp32; group rewards need more than one generation",
            "the rows named here are left out until then",
        ),
    ),
    Text(
        "原因：损失函数在该批数据的某个值处没有有限值",
        "损失中的 {op}（{phase}，{where}）由有限的输入产生 NaN 或 inf；损失为 {loss}。涉及的数据行：{rows}。",
        "sqrt、log、exp 和除法并非处处有有限的值或导数。在其后再屏蔽已经太迟：反向计算中 0 x inf 就是 NaN。",
        (
            "在 {op} 之前截断或屏蔽：sqrt(x + eps)、exp(x.clamp(max=20))，并为标准差设下限",
            "在脚本中：在运算之前把不计入的值换成无害的值（对其输入用 torch.where）",
            "偏好损失：log(1 - exp(x)) 用 fp32 的 log1mexp；组内奖励需要多于一个生成结果",
            "在此之前，略过此处所列的数据行",
        ),
    ),
)
CODES = (CAUSE,)
FAULT_CLASS = "K"
_DEVIATIONS = ("std", "var")
REMEDIES = ("skip_rows", "drop_batch")


def weigh(case: Case) -> Weight | None:
    """Named where rows or batches flip a failure that begins in an operation of the loss."""
    if case.trigger not in signs.FAILED or not signs.in_loss(case) or case.bad("supervised_tokens"):
        return None
    if signs.empty_micro(case) is not None:
        return None  # a mean over nothing is no pole of the formula
    singular = signs.is_singular(case)
    reasons = Reasons()
    reasons.hint(True, "localised", 0.5 if singular else 0.25)
    reasons.proof(singular and case.good("rows"), "rows", 0.75)
    reasons.proof(singular and case.good("known_good_batch"), "known_good_batch", 0.3)
    reasons.proof(_too_few(case) or signs.breaks_backward(case), "localised", 0.7)
    reasons.hint(case.bad("fp32"), "fp32", 0.2)
    reasons.against(case.good("fp32"), "fp32", 0.4)
    reasons.against(case.bad("scan_state"), "scan_state", REFUTED)
    reasons.against(case.good("loss_scales"), "loss_scales", 0.4)
    reasons.against(case.good("math_attention"), "math_attention", 0.2)
    reasons.against(not signs.from_clean_input(case), "localised", 0.5)
    found = signs.first(case, "op")
    rows = signs.rows(case)
    return reasons.weight(
        signs.spot(case),
        op=signs.op(case) or (found.name if found else "-"),
        phase=signs.phase(case),
        loss=case.reading.loss,
        rows=signs.listed(rows),
    )


def _too_few(case: Case) -> bool:
    """A deviation that is NaN from finite numbers: it was taken over a single one, and no other explanation is left.

    The correction for the mean divides by n - 1 (torch.std, ``correction=1``): one generation in a group is 0 / 0.
    """
    found = signs.first(case, "op")
    is_deviation = any(o.removesuffix("_mean") in _DEVIATIONS for o in signs.ops(case))
    return is_deviation and signs.of(found, "nan") is True and signs.of(found, "input_finite") is True
