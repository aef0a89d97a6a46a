"""Bad weights: a weight or buffer was not finite before the first step; training did not make it so.

What it sees:
    The scan of the state before the failing step finds a weight or buffer (frozen ones too) that is NaN or inf, and
    no earlier state has it finite. It may sleep: a bad row of an embedding shows itself when a token first uses it.

Why it is bad:
    The model that was loaded is broken: a key was missing and its tensor never initialised, the download is damaged,
    a cast to fp16 left the range, or a new row got no value. Whatever batch meets it gets the blame.

Example:
    embed_tokens.weight row 17 is inf from the start (2e5 cast to fp16); NaN at step 130, the first with token 17

What to do:
    Load the model again and compare it with its digest; look for missing keys in the loading report; initialise new
    rows with the mean of the others. No setting of the training helps.

Source:
    https://github.com/NVIDIA-NeMo/Automodel/pull/1980 , https://github.com/huggingface/transformers/issues/46002 ,
    https://github.com/meta-pytorch/torchtune/pull/218
"""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.incident import Suspect
from finitune.core.types import Severity
from finitune.engine.case import Case
from finitune.engine.causes import _signs as signs
from finitune.engine.weight import Reasons, Weight

CAUSE = Code(
    "MOD400",
    Severity.ERROR,
    Text(
        "cause: the model was loaded with bad weights",
        "{names} not finite from the start: {where}, index {index}, row {row}, value {value}.",
        "The tensor was never initialised, was damaged, or left the range of its format when it was cast. Training "
        "did not "
        "make it so, and no setting of the training cures it.",
        (
            "load the model anew and compare its files with their published digests",
            "read the loading report: a missing key leaves its tensor without values; new rows need an initialisation",
            "where the row belongs to a token that is never used: set it to 0",
            "in a script: for n, p in model.named_parameters(): assert p.isfinite().all(), n; the same for buffers",
        ),
    ),
    Text(
        "原因：加载的模型带有坏权重",
        "从一开始就不是有限值：{names}；首先是 {where}，下标 {index}，行 {row}，值 {value}。",
        "该张量未被初始化、已损坏，或在转换格式时超出范围。这不是训练造成的，任何训练设置都治不好它。",
        (
            "重新加载模型，并将其文件与公布的摘要比较",
            "查看加载报告：缺失的键会使张量没有值；新增的行需要初始化",
            "若该行属于从不使用的 token：将其设为 0",
            "在脚本中：for n, p in model.named_parameters(): assert p.isfinite().all(), n；buffer 同理",
        ),
    ),
)
CODES = (CAUSE,)
FAULT_CLASS = "H"
REMEDIES = ("repair_tensor", "skip_rows", "drop_batch")
_NOT_AS_COMPUTED = "not_as_computed"


def weigh(case: Case) -> Weight | None:
    """Named by the scan, where the tensor was bad from the start, or nothing of the run could have written it.

    Of a trained tensor whose past is out of reach that is only suspected. A computed buffer that is not what its module
    computes is seen as well, and named where the loss bears it out.
    """
    if case.good("computed_buffers"):
        return _of_buffers(case)
    gone_bad = signs.went_bad(case)
    bad = [s for s in signs.bad_state(case) if s.kind != "moment" and s not in gone_bad]
    if not bad:
        return None
    reasons = Reasons()
    from_the_start = any(_is_from_the_start(s) for s in bad) or case.reading.step <= 1
    reasons.hint(True, "scan_state", 0.9)
    reasons.proof(from_the_start, "scan_state", 0.0)
    reasons.hint(case.good("rows"), "rows", 0.2)
    reasons.hint(case.bad("older_weights"), "older_weights", 0.2)
    reasons.against(case.good("older_weights"), "older_weights", 0.4)
    reasons.against(case.good("fp32"), "fp32", 0.7)
    worst = bad[0]
    return reasons.weight(
        worst.name,
        names=signs.listed(s.name for s in bad),
        index=signs.shown(worst.data.get("index")),
        row=signs.shown(worst.data.get("row")),
        value=signs.shown(worst.data.get("value")),
    )


def _of_buffers(case: Case) -> Weight | None:
    reasons = Reasons()
    reasons.proof(True, "computed_buffers", 0.9)
    told = [s for s in case.suspects_of("buffer") if s.data.get("what") == _NOT_AS_COMPUTED]
    names = [s.name for s in case.suspects_of("buffer")]
    worst = told[0] if told else None
    return reasons.weight(
        worst.name if worst is not None else "",
        names=signs.listed(names),
        index=signs.shown(signs.of(worst, "index")),
        row="-",
        value=signs.shown(signs.of(worst, "value")),
    )


def _is_from_the_start(suspect: Suspect) -> bool:
    fixed = suspect.kind == "buffer" or suspect.data.get("frozen") is True
    return fixed or (suspect.data.get("since_exact") is True and suspect.data.get("since_step") is None)
