"""Model math: a formula inside the model has no finite value here, in any precision.

What it sees:
    The first bad operation sits in a module of the model: a division, a norm, a root, or any operation of the backward
    pass. Its input is finite and of ordinary size, and fp32 does not help. A weight row of zeros (DoRA divides by its
    norm) is the usual reason where every batch fails; a compiled or fused backward where only gradients are bad.

Why it is bad:
    No data and no setting of the training is at fault, so that everything that is tried in vain looks like a hint.

Example:
    DoRA on a weight with a row of zeros: magnitude / norm is 0 / 0 at the first step, in fp32 too

What to do:
    A floor under the denominator, RoPE and norms in fp32, or another variant of the adapter (plain LoRA instead of
    DoRA).

Source:
    https://github.com/huggingface/peft/issues/2049 , https://github.com/huggingface/transformers/issues/45676 ,
    https://github.com/NVIDIA/TransformerEngine/issues/1245
"""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.incident import Suspect
from finitune.core.types import Severity
from finitune.engine.case import Case
from finitune.engine.causes import _signs as signs
from finitune.engine.weight import REFUTED, Reasons, Weight

CAUSE = Code(
    "NUM405",
    Severity.ERROR,
    Text(
        "cause: a formula of the model has no finite value here",
        "{op} in {where} ({phase} pass) makes NaN or inf from finite input of ordinary size, in fp32 as well. Weight "
        "rows of zeros: {zeros}; rows of data that meet it: {rows}.",
        "The formula divides by 0, takes a root or logarithm outside of its range, or its backward pass is wrong. The "
        "number format is not at fault, and rows that meet it are no worse than others.",
        (
            "a floor under the denominator or under the root: x / (norm + eps)",
            "a backward pass of your own, a compiled or a fused one: torch.autograd.gradcheck, or take the plain one",
            "with DoRA: lora.use_dora: false, or leave out the modules with rows of zeros",
            "in a script: keep RoPE and norms in fp32, and look at {where} with the input of this step",
        ),
    ),
    Text(
        "原因：模型中的某个公式在此处没有有限值",
        "{where} 中的 {op}（{phase}）由大小正常的有限输入产生 NaN 或 inf，用 fp32 也是如此。全零的权重行：{zeros}；"
        "触发它的数据行：{rows}。",
        "该公式除以 0、在定义域之外开方或取对数，或其反向计算有误。数值格式没有问题，触发它的数据行也不比其他行差。",
        (
            "为分母或根号下的值设下限：x / (norm + eps)",
            "自己写的、编译的或融合的反向计算：用 torch.autograd.gradcheck 检查，或改用普通实现",
            "使用 DoRA 时：lora.use_dora: false，或排除带有全零行的模块",
            "在脚本中：让 RoPE 和归一化保持 fp32，并用该步的输入检查 {where}",
        ),
    ),
)
CODES = (CAUSE,)
FAULT_CLASS = "W"
REMEDIES = ("skip_rows",)


def weigh(case: Case) -> Weight | None:
    """Named where the row of zeros was seen, older weights are fine, rows flip a pole that ordinary numbers hit, or the
    backward pass makes a bad gradient of clean numbers; else suspected.
    """
    broken = signs.breaks_backward(case) and not signs.in_attention(case)
    singular = signs.is_singular(case)
    if case.trigger not in signs.FAILED or not signs.module(case) or not (singular or broken):
        return None
    zeros = [s for s in case.suspects_of("parameter") if _is_zero(s)]
    pole = singular and signs.from_sound_numbers(case)
    reasons = Reasons()
    reasons.hint(True, "localised", 0.4)
    reasons.proof(bool(zeros) or broken, "localised", 0.7)
    reasons.proof(pole and case.good("rows"), "rows", 0.7)
    reasons.proof(case.bad("fp32") and case.good("older_weights"), "older_weights", 0.4)
    reasons.hint(case.bad("fp32"), "fp32", 0.3)
    reasons.hint(case.bad("rows"), "rows", 0.2)
    reasons.hint(case.bad("known_good_batch"), "known_good_batch", 0.2)
    reasons.against(case.good("fp32"), "fp32", 0.2)
    reasons.against(case.good("loss_scales"), "loss_scales", REFUTED)
    reasons.against(case.bad("scan_state"), "scan_state", REFUTED)
    reasons.against(case.good("lower_lr"), "lower_lr", 0.5)
    reasons.against(case.good("tighter_clip"), "tighter_clip", 0.5)
    reasons.against(case.good("rows") and not (broken or pole), "rows", 0.7)
    reasons.against(case.good("math_attention"), "math_attention", 0.4)
    reasons.against(not signs.from_clean_input(case), "localised", 0.4)
    return reasons.weight(
        signs.module(case),
        op=signs.op(case),
        phase=signs.phase(case),
        zeros=signs.listed(_row(s) for s in zeros),
        rows=signs.listed(signs.rows(case)),
    )


def _is_zero(suspect: Suspect) -> bool:
    """A weight, or the row of it that was found, holds nothing but zeros."""
    amax = suspect.data.get("row_amax", suspect.data.get("amax"))
    return signs.number(amax) == 0.0


def _row(suspect: Suspect) -> str:
    row = suspect.data.get("row")
    return suspect.name if row is None else f"{suspect.name}[{row}]"
