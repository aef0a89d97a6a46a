"""Forward overflow: a number of the forward pass leaves the range of fp16, whose largest is 65504.

What it sees:
    The step fails in fp16 and is finite in fp32 or bf16, with the same batch and the same weights. The replay names
    the module whose finite input gives an output beyond the range; islands name the modules that must not be in fp16.
    A token or a row may trigger it: then the row is finite in fp32 too, so it is not the row that is broken.

Why it is bad:
    One inf in the residual stream makes the loss NaN. A loss scale cannot help: it acts on gradients. Dynamic scaling
    only hides it, as every step is skipped while the weights stay finite.

Example:
    step 159: layers.11.mlp.down_proj, output beyond 65504 from finite input; in bf16 the same step has loss 4.3

What to do:
    precision: bf16, which has the range of fp32; else keep the named modules in fp32. No setting of the optimizer and
    no clipping can cure a forward pass.

Source:
    https://github.com/huggingface/transformers/issues/5651 , https://github.com/unslothai/unsloth/pull/4014 ,
    https://github.com/vllm-project/vllm/issues/40290 ; Sun et al. 2024, "Massive Activations in Large Language
    Models"
"""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.incident import Trigger
from finitune.core.types import Reading, Severity
from finitune.engine.case import Case
from finitune.engine.causes import _signs as signs
from finitune.engine.weight import Reasons, Weight

CAUSE = Code(
    "NUM400",
    Severity.ERROR,
    Text(
        "cause: the forward pass overflows in fp16",
        "{where} puts out {amax}, and fp16 ends at {limit}. The same step is finite under: {cured_by}. "
        "Rows that trigger it: {rows} (tokens: {tokens}).",
        "Models made in bf16 carry activations that fp16 cannot hold. One inf makes the loss NaN, and a smaller loss "
        "scale cannot help, because the forward pass does not know the scale.",
        (
            "precision: bf16 (the range of fp32 at the price of fp16), where the device has it",
            "keep these modules in fp32 and the rest in fp16: {modules}",
            "in a script: torch.autocast(..., dtype=torch.bfloat16), or torch.autocast(..., enabled=False) and "
            ".float() "
            "around the modules named here",
            "precision: fp32 where nothing else is left",
        ),
    ),
    Text(
        "原因：前向计算在 fp16 中溢出",
        "{where} 的输出为 {amax}，而 fp16 的上限是 {limit}。同一步在以下条件下有限：{cured_by}。触发它的数据行："
        "{rows}（token：{tokens}）。",
        "以 bf16 训练出来的模型带有 fp16 装不下的激活值。一个 inf 就会使损失变成 NaN；减小损失缩放无济于事，"
        "因为前向计算与缩放无关。",
        (
            "设备支持时用 precision: bf16（范围同 fp32，开销同 fp16）",
            "让这些模块用 fp32 计算，其余保持 fp16：{modules}",
            "在脚本中：torch.autocast(..., dtype=torch.bfloat16)；或在此处所列模块周围使用 "
            "torch.autocast(..., enabled=False) 和 .float()",
            "别无他法时用 precision: fp32",
        ),
    ),
)
CODES = (CAUSE,)
FAULT_CLASS = "B"
REMEDIES = ("fp32_modules", "bf16", "fp32")


def weigh(case: Case) -> Weight | None:
    """Named where another precision cures a failing forward pass."""
    if not signs.is_half(case) or case.trigger not in (Trigger.LOSS, Trigger.OUTLIER, Trigger.FORECAST):
        return None
    reasons = Reasons()
    reasons.proof(case.good("fp32"), "fp32", 0.8)
    reasons.proof(case.good("bf16") and not case.bad("fp32"), "bf16", 0.6)
    reasons.hint(case.good("islands"), "islands", 0.4)
    reasons.hint(_is_localised(case), "localised", 0.3)
    reasons.hint(case.trigger is Trigger.FORECAST, "trigger", 0.4)
    reasons.against(case.bad("fp32"), "fp32", 0.1)
    reasons.against(case.bad("bf16"), "bf16", 0.5)
    reasons.against(case.bad("scan_state"), "scan_state", 0.5)
    reasons.against(case.good("math_attention"), "math_attention", 0.6)
    # Rows of the vocabulary that are far too large: whether fp32 works with them is for that cause to judge.
    reasons.against(case.good("vocabulary_rows"), "vocabulary_rows", 0.7)
    # What leaves the range in attention are the scores, ahead of the softmax: a softmax that fails has another reason.
    reasons.against(signs.is_softmax(case), "localised", 0.4)
    reasons.against(case.good("let_pass"), "let_pass", 0.3)
    where, amax = _where(case)
    return reasons.weight(
        where,
        amax=signs.shown(amax),
        limit=signs.number(case.facts.get("half_max")) or signs.FP16_MAX,
        cured_by=signs.cured_by(case, "bf16", "fp32"),
        rows=signs.listed(signs.rows(case)),
        tokens=signs.tokens(case),
        modules=signs.listed(signs.strings(case.number("islands", "modules", ())) or ((where,) if where else ())),
    )


def _is_localised(case: Case) -> bool:
    """A module made a bad output from clean input in the forward pass."""
    found = case.suspects_of("op", "module")
    return bool(found) and signs.phase(case) == "forward" and signs.from_clean_input(case)


def _where(case: Case) -> tuple[str, object]:
    """Name and largest magnitude: of a weight that does not fit, of the module found, or of the largest one seen."""
    for suspect in case.suspects_of("parameter"):
        amax = signs.number(suspect.data.get("amax"))
        if amax is not None and amax > signs.FP16_MAX and suspect.data.get("what") != "gradient":
            return suspect.name, amax
    spot = signs.spot(case)
    if spot:
        found = signs.first(case, "op", "module")
        return spot, signs.number(signs.of(found, "value")) or signs.of(found, "amax")
    return _loudest(case.reading)


def _loudest(reading: Reading) -> tuple[str, object]:
    if not reading.amax:
        return "", None
    # A NaN is larger than anything.
    name = max(
        reading.amax, key=lambda n: (not reading.amax[n] <= signs.FP16_MAX, abs(signs.number(reading.amax[n]) or 0))
    )
    return name.removesuffix(".input"), reading.amax[name]
