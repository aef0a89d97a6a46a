"""Not reproducible: the same step, computed again from the same state, does not fail.

What it sees:
    The verdict of the replay alone: the failing step was computed again with the same weights, batch and randomness,
    and the failure came and went.

Why it is bad:
    A failure that does not repeat has a cause that no batch and no setting holds: a race between a communication and
    a computation, a faulty card or memory, a kernel with atomics, or randomness that nobody seeds. Whatever is
    changed after such a failure seems to help.

Example:
    loss nan at step 812; computed again three times: 2.213, 2.213, 2.213

What to do:
    Compute the step again and go on. If it comes back: look at the machine (ECC, XID), at overlapped communication
    and its version, and at random numbers drawn outside of torch.

Source:
    https://github.com/deepspeedai/DeepSpeed/pull/7965 , https://github.com/deepspeedai/DeepSpeed/issues/5347 ,
    https://github.com/pytorch/torchtitan/issues/951 , https://github.com/microsoft/dion/issues/76 (hardware
    suspected, and it was not)
"""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.incident import Trigger, Verdict
from finitune.core.types import Severity
from finitune.engine.case import Case
from finitune.engine.causes._signs import shown
from finitune.engine.weight import REFUTED, Reasons, Weight

CAUSE = Code(
    "SYS400",
    Severity.ERROR,
    Text(
        "cause: the failure does not repeat",
        "Step {step} was computed again {num_tries} times from the same state: {num_bad} of them failed. "
        "Its loss is then {loss}.",
        "Neither the batch nor a setting explains a failure that comes and goes. What does: a race in overlapped "
        "communication, the hardware, kernels with atomics, or randomness that is not seeded.",
        (
            "nothing, if it happens once: the step was computed again",
            "if it comes back: look at the machine's error counters (nvidia-smi -q: ECC; dmesg: Xid)",
            "with DeepSpeed: overlap_comm: false, or version 0.19.3 and later",
            "in a script: seed everything that is drawn outside of torch, and set the dataloader's generator",
        ),
    ),
    Text(
        "原因：该故障无法重现",
        "从同一状态把第 {step} 步重算了 {num_tries} 次：其中 {num_bad} 次失败。其损失为 {loss}。",
        "时有时无的故障不能用这一批或某项设置来解释。可能的原因：通信与计算重叠时的竞争、硬件、使用原子操作的算子，"
        "或没有固定种子的随机数。",
        (
            "若只发生一次，无需处理：该步已重新计算",
            "若再次出现：查看机器的错误计数（nvidia-smi -q 中的 ECC；dmesg 中的 Xid）",
            "使用 DeepSpeed 时：overlap_comm: false，或升级到 0.19.3 及以后",
            "在脚本中：为 torch 之外的一切随机数设定种子，并设置 dataloader 的 generator",
        ),
    ),
)
CODES = (CAUSE,)
FAULT_CLASS = "G/T"
REMEDIES = ("retry",)


def weigh(case: Case) -> Weight | None:
    """Named by the verdict, and by nothing else.

    An update that was undone is another matter: what was replayed is a state computed anew, not the one that failed.
    """
    reasons = Reasons()
    reasons.proof(case.verdict is Verdict.NOT_REPRODUCED, "verdict", 0.95)
    reasons.against(case.trigger is Trigger.UPDATE, "trigger", REFUTED)
    return reasons.weight(
        case.finding.where if case.trigger is Trigger.UPDATE else "",
        step=case.reading.step,
        num_tries=shown(case.number("same_again", "num_tries")),
        num_bad=shown(case.number("same_again", "num_bad")),
        loss=shown(case.number("same_again", "loss")),
    )
