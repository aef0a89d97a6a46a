"""Vocabulary: rows of the embedding or of the output head do not fit, and the tokens that use them fail.

What it sees:
    The failure begins in an embedding or output head and hangs on rows that hold certain tokens: new tokens whose
    rows got a wrong scale or no values, or a padding row. Or nothing fails, but the loss falls with rows out of all
    proportion set to the mean of the others.

Why it is bad:
    A row that is a thousand times larger than the others dominates every norm behind it. Only samples with that token
    fail, so the sample is blamed.

Example:
    rows 64-67 (new tokens) have 1000 times the norm of the others: loss 141 at step 1, where ln(vocabulary) is 4.2

What to do:
    Give new rows the mean of the old ones, in embedding and head alike; the padding row 0; and no more tokens in the
    tokenizer than rows in the embedding.

Source:
    https://github.com/huggingface/transformers/issues/29219 , https://github.com/AnswerDotAI/ModernBERT/pull/96 ,
    https://github.com/huggingface/transformers/pull/27114
"""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity
from finitune.engine.case import Case
from finitune.engine.causes import _signs as signs
from finitune.engine.weight import REFUTED, Reasons, Weight

CAUSE = Code(
    "MOD402",
    Severity.ERROR,
    Text(
        "cause: rows of the vocabulary do not fit",
        "{where} (row {row}, magnitude {amax}) fails for some tokens only: {tokens}. Rows of data with them: {rows}.",
        "New or unused rows were never trained: random, empty or of another scale than the rest. Only data with their "
        "tokens meets them.",
        (
            "give new rows the mean of the old ones (transformers: resize_token_embeddings(..., mean_resizing=True))",
            "the same for the output head where it is not tied; the padding row is 0",
            "in a script: compare the norm of each embedding row with the median, and len(tokenizer) with the rows",
        ),
    ),
    Text(
        "原因：词表中的某些行不合适",
        "{where}（第 {row} 行，大小 {amax}）只对某些 token 失败：{tokens}。含有它们的数据行：{rows}。",
        "新增或未使用的行从未训练过：随机、为空，或与其他行的尺度不同。只有含有这些 token 的数据会遇到它们。",
        (
            "新增的行取旧行的平均值（transformers：resize_token_embeddings(..., mean_resizing=True)）",
            "若输出头没有共享权重，也同样处理；填充行设为 0",
            "在脚本中：把每个嵌入行的范数与中位数比较，并把 len(tokenizer) 与行数比较",
        ),
    ),
)
CODES = (CAUSE,)
FAULT_CLASS = "O"
REMEDIES = ("repair_tensor", "skip_rows", "drop_batch")


def weigh(case: Case) -> Weight | None:
    """Named where the failure goes away with rows brought to the usual length or set to the mean of the others, or
    where rows of data flip one that begins in an embedding or head.
    """
    if case.good("mean_rows"):
        return _of_means(case)
    scaled = case.good("vocabulary_rows")
    told = [s for s in case.suspects_of("parameter", "module") if s.data.get("what") not in ("gradient", "update")]
    held = sorted((s for s in told if signs.of_vocabulary(s)), key=lambda s: s.data.get("what") != _OUT_OF_SCALE)
    if not held or not (scaled or case.trigger in signs.FAILED):
        return None
    begins = any(s.name == signs.module(case) for s in held) or held[0].kind == "parameter"
    reasons = Reasons()
    reasons.proof(scaled, "vocabulary_rows", 0.9)
    reasons.hint(begins, "localised", 0.4)
    reasons.proof(begins and case.good("rows") and not scaled, "rows", 0.6)
    reasons.hint(bool(case.suspects_of("tokens")), "rows", 0.3)
    # A row that is not finite at all is a bad weight; that it is one of the vocabulary is the smaller half of it.
    reasons.against(case.bad("scan_state"), "scan_state", REFUTED)
    reasons.against(case.bad("known_good_batch") and not scaled, "known_good_batch", 0.5)
    range_only = signs.is_half(case) and signs.precision_cures(case) and not _is_loud_in_fp32(case)
    reasons.against(range_only, signs.cured_by(case, "fp32", "bf16"), REFUTED)
    reasons.against(case.good("let_pass"), "let_pass", 0.4)
    return reasons.weight(
        held[0].name,
        row=signs.listed(map(str, held[0].data.get("rows") or [signs.shown(held[0].data.get("row"))]), _MOST),
        amax=signs.shown(held[0].data.get("amax")),
        tokens=_tokens(case),
        rows=signs.listed(signs.rows(case)),
    )


def _of_means(case: Case) -> Weight | None:
    """The experiment has told which rows of which table; the table may have any name."""
    reasons = Reasons()
    reasons.proof(True, "mean_rows", 0.9)
    first = next((s for s in case.suspects_of("parameter") if s.data.get("what") == _OUT_OF_SCALE), None)
    tokens = signs.steps(case.number("mean_rows", "tokens", ()))
    return reasons.weight(
        str(case.number("mean_rows", "first", "-")),
        row=signs.listed(map(str, tokens), _MOST),
        amax=signs.shown(signs.of(first, "amax")),
        tokens=signs.listed(map(str, tokens), _MOST),
        rows=signs.listed(signs.rows(case)),
    )


_OUT_OF_SCALE = "row_norm"
_MOST = 8
_ABOVE_GUESSING = 1.5


def _is_loud_in_fp32(case: Case) -> bool:
    """With all the range there is, the loss is still far above that of guessing."""
    guessing = signs.number(case.number("vocabulary_rows", "guessing"))
    loss = signs.number(case.number("fp32", "loss"))
    return guessing is not None and loss is not None and loss > _ABOVE_GUESSING * guessing


def _tokens(case: Case) -> str:
    """The tokens whose rows are out of scale; else the spans of the rows that fail."""
    found = case.number("vocabulary_rows", "tokens", ())
    known = [str(t) for t in found if isinstance(t, int)] if isinstance(found, list | tuple) else []
    return signs.listed(known, _MOST) if known and case.good("vocabulary_rows") else signs.tokens(case)
