"""Learning rate: the steps are too long. Blamed only where a rollback with a smaller rate proved it.

What it sees:
    From a state some steps back, over the same batches: with a smaller rate (where it had been raised: with that of
    before) the loss stays near that of before, as the run went it does not. Without that experiment the rate is not
    even suspected, whatever the curve looks like. A failure in fp16 that fp32 cures is one of range.

Why it is bad:
    The loss rises for several steps while all numbers are finite; the model forgets what it knew and ends near the
    level of guessing. In fp32 with Adam there is never a NaN, so nothing else stops it.

Example:
    losses 2.4, 3.1, 6.8, 9.0; from 8 steps back with a tenth of the rate: 2.4, 2.4, 2.3, 2.4

What to do:
    The rate that was proved, with a warm-up. The run goes back to before the rise: what came after is lost anyhow.

Source:
    https://github.com/haotian-liu/LLaVA/issues/1375 , https://github.com/paiml/aprender/pull/2258 ,
    https://github.com/haotian-liu/LLaVA/issues/1301 ; 14 threads in which a changed rate had no effect are why it
    must be proved, among them https://github.com/prs-eth/Marigold/issues/111 and
    https://github.com/hiyouga/LlamaFactory/issues/9567
"""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity
from finitune.engine.case import Case
from finitune.engine.causes import _signs as signs
from finitune.engine.weight import REFUTED, Reasons, Weight

CAUSE = Code(
    "OPT401",
    Severity.ERROR,
    Text(
        "cause: the learning rate is too high",
        "From step {start_step}, over the same batches: the loss ends at {same} as the run went and at {lower} with "
        "{factor} of the rate; before it was {median_loss}. The rate was {lr}.",
        "The steps overshoot: each makes the loss larger, with finite numbers all along. This was proved on a replay "
        "of "
        "the same batches; precision and data were left as they are.",
        (
            "learning_rate: {lower_lr}, and warmup_ratio: 0.05",
            "go back to a checkpoint from before step {start_step}: what the model lost does not come back by itself",
            "in a script: the same rate in the optimizer and a linear warm-up over the first 5 % of the steps",
        ),
    ),
    Text(
        "原因：学习率过大",
        "从第 {start_step} 步起用相同的各批数据：按原样运行损失最终为 {same}，学习率取 {factor} 倍为 {lower}；"
        "此前为 {median_loss}。学习率为 {lr}。",
        "步子过大：每一步都使损失升高，而所有数值始终有限。这是在相同数据的重放中证明的；精度和数据都没有改变。",
        (
            "learning_rate: {lower_lr}，并设置 warmup_ratio: 0.05",
            "回到第 {start_step} 步之前的检查点：模型丢失的能力不会自己回来",
            "在脚本中：在优化器里使用同样的学习率，并在前 5 % 的步数内线性预热",
        ),
    ),
)
CODES = (CAUSE,)
FAULT_CLASS = "I"
REMEDIES = ("lower_lr",)


def weigh(case: Case) -> Weight | None:
    """Only after the experiment, and only where it cured."""
    proof = signs.cured_by(case, "borne_rate", "lower_lr")
    if proof == "-":
        return None
    reasons = Reasons()
    reasons.proof(True, proof, 0.8)
    reasons.hint(case.good("older_weights"), "older_weights", 0.2)
    reasons.hint(case.bad("known_good_batch"), "known_good_batch", 0.3)
    reasons.hint(case.bad("update_share"), "update_share", 0.2)
    reasons.against(signs.is_half(case) and signs.precision_cures(case), signs.cured_by(case, "fp32", "bf16"), REFUTED)
    reasons.against(case.good("adam_eps"), "adam_eps", REFUTED)
    reasons.against(case.bad("scan_state"), "scan_state", REFUTED)
    reasons.against(case.good("tighter_clip"), "tighter_clip", 0.8)
    reasons.against(case.good("rows"), "rows", 0.5)
    reasons.against(case.good("known_good_batch"), "known_good_batch", 0.6)
    reasons.against(case.good("fresh_moments"), "fresh_moments", 0.7)
    reasons.against(case.good("math_attention"), "math_attention", 0.3)
    rate, shown, lower = _rates(case, proof)
    return reasons.weight(
        start_step=signs.shown(case.number(proof, "start_step")),
        same=_last(case.number(proof, "losses_same")),
        lower=_last(case.number(proof, "losses") or case.number(proof, "losses_tenth")),
        factor=f"{shown:.3g}",
        median_loss=signs.shown(case.number(proof, "median_loss", case.past.get("median_loss"))),
        lr=signs.shown(rate),
        lower_lr=signs.shown(lower),
    )


def _rates(case: Case, proof: str) -> tuple[float | None, float, float | None]:
    """The rate that was too high, the share of it that the losses are of, and the rate to be set."""
    rate = signs.number(case.reading.lr)
    if proof == "borne_rate":
        borne, raised = signs.number(case.number(proof, "max_lr")), signs.number(case.number(proof, "was"))
        return raised or rate, borne / raised if borne and raised else 0.0, borne
    factor = signs.number(case.number("lower_lr", "factor")) or 0.1
    holds = signs.number(case.number("lower_lr", "holds")) or factor
    return rate, holds, rate * factor if rate is not None else None


def _last(losses: object) -> object:
    return losses[-1] if isinstance(losses, list | tuple) and losses else "-"
