"""Router: the gate of a mixture of experts fails, and its choice of experts with it.

What it sees:
    The first bad module, the module that must be in fp32, or the tensor that is not finite is a router (``gate``,
    ``router``; ``gate_proj`` of a plain MLP is none).

Why it is bad:
    A NaN in the router sends every token everywhere or to one expert; what follows is an out-of-memory error or a
    time-out in the next step, and that is what is reported.

Example:
    layers.3.block_sparse_moe.gate: logits NaN from finite input in fp16, finite with the gate alone in fp32

What to do:
    Compute router logits and their softmax in fp32. Where experts die: check that the auxiliary loss has a gradient
    before its coefficient is tuned.

Source:
    https://github.com/NVIDIA-NeMo/Automodel/issues/1408 , https://github.com/huggingface/transformers/issues/45120 ,
    https://github.com/huggingface/transformers/issues/28205 ; Zoph et al. 2022, "ST-MoE", section 3 (router in fp32)
"""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity
from finitune.engine.case import Case
from finitune.engine.causes import _signs as signs
from finitune.engine.weight import REFUTED, Reasons, Weight

CAUSE = Code(
    "MOD403",
    Severity.ERROR,
    Text(
        "cause: the router of the experts fails",
        "{where} is the first to fail ({op}, {phase} pass, magnitude {amax}). It is fine under: {cured_by}.",
        "Routing takes a softmax and a top-k of few numbers; one NaN or overflow there changes the path of every "
        "token, "
        "and shows itself as a full memory or a time-out later.",
        (
            "compute the router's logits and softmax in fp32, the experts may stay in half",
            "if experts are never chosen: check that the auxiliary loss has a gradient at the router",
            "in a script: with torch.autocast(..., enabled=False) around {where}, on x.float()",
        ),
    ),
    Text(
        "原因：专家路由器失败",
        "{where} 最先失败（{op}，{phase}，大小 {amax}）。在以下条件下正常：{cured_by}。",
        "路由对少数几个数做 softmax 和 top-k；那里的一个 NaN 或溢出会改变每个 token 的路径，之后表现为显存耗尽或超时。",
        (
            "路由器的 logits 和 softmax 用 fp32 计算，专家可以保持半精度",
            "若有专家从未被选中：检查辅助损失在路由器上是否有梯度",
            "在脚本中：在 {where} 周围使用 torch.autocast(..., enabled=False)，输入为 x.float()",
        ),
    ),
)
CODES = (CAUSE,)
FAULT_CLASS = "Q"
REMEDIES = ("fp32_modules", "skip_rows", "drop_batch")


def weigh(case: Case) -> Weight | None:
    """Named where the router alone in fp32 cures, or rows flip a failure that begins in it."""
    islands = signs.strings(case.number("islands", "modules", ())) if case.good("islands") else ()
    told = [s for s in case.suspects_of("module", "parameter") if s.data.get("what") not in ("gradient", "update")]
    routers = [s for s in told if signs.is_router(s.name)]
    only_router = bool(islands) and all(map(signs.is_router, islands))
    if not only_router and not routers:
        return None
    begins = signs.is_router(signs.module(case))
    reasons = Reasons()
    reasons.hint(bool(routers), "localised", 0.3)
    reasons.hint(begins, "localised", 0.2)
    reasons.proof(only_router, "islands", 0.85)
    reasons.proof(begins and case.good("rows") and not case.good("fp32"), "rows", 0.5)
    reasons.against(bool(islands) and not only_router, "islands", 0.5)
    reasons.against(case.bad("scan_state"), "scan_state", REFUTED)
    reasons.against(case.good("lower_lr"), "lower_lr", 0.6)
    where = islands[0] if only_router else routers[0].name
    return reasons.weight(
        where,
        op=signs.op(case) or "-",
        phase=signs.phase(case),
        amax=signs.shown(signs.of(routers[0] if routers else None, "amax")),
        cured_by=signs.cured_by(case, "islands", "fp32", "bf16"),
    )
