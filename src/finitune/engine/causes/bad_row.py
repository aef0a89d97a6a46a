"""Bad row: one or a few rows of the batch fail whatever they are computed in; the rest of the batch is fine.

What it sees:
    Bisection of the batch, with padding width and batch size kept, finds rows that fail alone, and the others
    together are fine. Other batches are fine on the same weights. fp32 does not help: a row that is finite in fp32
    triggers an overflow and is not broken.

Why it is bad:
    It comes back in every epoch, and moves with the shuffle, so that step numbers never match. One broken value (a
    NaN pixel, an infinite weight, an empty span) makes the loss of the whole batch NaN.

Example:
    batch of 4 rows: rows 1, 3, 4 together have loss 2.2, row 2 alone NaN, in fp32 as well

What to do:
    Quarantine the row by its content and go on; then repair or drop it in the data.

Source:
    https://github.com/prs-eth/Marigold/issues/111 , https://github.com/NVIDIA/Megatron-LM/issues/780 ,
    https://github.com/TIGER-AI-Lab/MAmmoTH/issues/36
"""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.incident import Suspect
from finitune.core.types import Severity
from finitune.engine.case import Case
from finitune.engine.causes import _signs as signs
from finitune.engine.weight import REFUTED, Reasons, Weight

CAUSE = Code(
    "DAT401",
    Severity.ERROR,
    Text(
        "cause: rows of the data are broken",
        "{num_bad} of {num_units} rows in step {step} fail alone, the others together are fine: {rows} (tokens: "
        "{tokens}; "
        "bad input: {inputs}).",
        "The same weights take other batches without harm, and another precision does not help. The fault lies in "
        "what "
        "these rows hold.",
        (
            "open the rows named here (file:row#digest): empty parts, NaN or huge values, a wrong encoding",
            "repair them or take them out; until then they are in quarantine and left out wherever they come up",
            "in a script: test that every input tensor is finite, and log the row ids with each step",
        ),
    ),
    Text(
        "原因：数据中有坏行",
        "第 {step} 步的 {num_units} 行中有 {num_bad} 行单独计算也失败，其余放在一起正常：{rows}（token：{tokens}；"
        "异常输入：{inputs}）。",
        "同样的权重能正常处理其他批次，换用其他精度也无济于事。问题出在这些行的内容上。",
        (
            "打开此处所列的行（文件:行号#摘要）：空的部分、NaN 或巨大的数值、错误的编码",
            "修复或移除它们；在此之前它们被隔离，无论出现在哪里都会被略过",
            "在脚本中：检查每个输入张量是否有限，并随每一步记录行号",
        ),
    ),
)
CODES = (CAUSE,)
FAULT_CLASS = "N"
REMEDIES = ("skip_rows", "drop_batch")


def weigh(case: Case) -> Weight | None:
    """Named where leaving rows out made the failure go away."""
    reasons = Reasons()
    inputs = [s for s in case.suspects_of("input") if _is_bad(s)]
    reasons.proof(case.good("rows"), "rows", 0.75)
    reasons.hint(bool(inputs), "localised", 0.5)
    reasons.hint(case.good("known_good_batch"), "known_good_batch", 0.3)
    reasons.against(case.bad("rows"), "rows", 0.6)
    reasons.against(signs.is_half(case) and signs.precision_cures(case), signs.cured_by(case, "fp32", "bf16"), REFUTED)
    reasons.against(case.bad("scan_state"), "scan_state", REFUTED)
    reasons.against(case.bad("known_good_batch"), "known_good_batch", 0.4)
    reasons.against(case.good("let_pass"), "let_pass", 0.4)
    reasons.against(case.good("math_attention"), "math_attention", 0.5)
    reasons.against(case.good("padding"), "padding", 0.5)
    # An operation that is finite nearly everywhere made it: the code and the row together are at fault.
    by_code = (signs.is_singular(case) or signs.is_softmax(case)) and not inputs
    reasons.against(by_code and signs.from_clean_input(case), "localised", 0.7)
    # No data makes a bad gradient where the forward pass and the gradient that comes in are in order.
    reasons.against(signs.breaks_backward(case) and not inputs, "localised", REFUTED)
    reasons.against(case.bad("supervised_tokens"), "supervised_tokens", 0.3)
    rows = signs.rows(case)
    return reasons.weight(
        rows[0] if rows else "",
        rows=signs.listed(rows),
        num_bad=signs.shown(case.number("rows", "num_bad", len(rows))),
        num_units=signs.shown(case.number("rows", "num_units", case.facts.get("num_units"))),
        step=case.reading.step,
        tokens=signs.tokens(case),
        inputs=signs.listed(s.name for s in inputs),
    )


def _is_bad(suspect: Suspect) -> bool:
    """An input tensor that holds a NaN or inf."""
    num_bad = signs.number(suspect.data.get("num_bad"))
    return suspect.data.get("input_finite") is False or suspect.data.get("finite") is False or bool(num_bad)
