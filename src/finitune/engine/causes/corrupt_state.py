"""Corrupt state: a weight or moment that was good went bad, and no update of ours wrote that value.

What it sees:
    The scan of the state before the failing step finds a bad tensor that an earlier state has good: a frozen weight
    that nothing writes, or a weight or moment whose updates were all finite. Or the state is finite and the failure
    goes away with fresh moments: a moment holds a wrong value.

Why it is bad:
    Something else wrote into the memory of the training: a bit that flipped, a faulty card, a buffer that is shared
    or reused, a kernel that writes past its end. It comes back where it came from the hardware.

Example:
    model.layers.1.mlp.up_proj.weight|exp_avg is NaN from step 41 on; the update of step 40 was finite

What to do:
    Take the tensor back from an earlier state, or start that moment anew. Then look at the machine; a second incident
    of this kind is a reason to change it.

Source:
    https://github.com/pytorch/torchtitan/issues/951 ,
    https://github.com/jade-hpc-gpu/jade-hpc-gpu.github.io/issues/194 , https://github.com/microsoft/dion/issues/76 (a
    board was changed, and the NaN came back: prove it before you change it)
"""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.incident import Suspect, Trigger, Verdict
from finitune.core.types import Severity
from finitune.engine.case import Case
from finitune.engine.causes import _signs as signs
from finitune.engine.weight import REFUTED, Reasons, Weight

CAUSE = Code(
    "SYS403",
    Severity.ERROR,
    Text(
        "cause: a tensor of the training state was corrupted",
        "{where} is bad since step {since_step} (index {index}: {value}, it was {was}); before it was good, and no "
        "update of the run wrote that value. Tensors concerned: {names}.",
        "Updates are checked before they are kept, so something else wrote into this memory: a flipped bit, a faulty "
        "device, a buffer that is shared by mistake, or a kernel that writes past its end.",
        (
            "nothing for this run: the tensor is taken from an earlier state, or its moments start anew",
            "look at the machine's error counters (nvidia-smi -q: ECC; dmesg: Xid, EDAC) before you change hardware",
            "in a script: look for code that writes to .data of a parameter, or keeps a view of it across steps",
        ),
    ),
    Text(
        "原因：训练状态中的一个张量被破坏",
        "{where} 自第 {since_step} 步起异常（下标 {index}：{value}，原为 {was}）；此前正常，"
        "且本次训练的更新没有写过该值。涉及的张量：{names}。",
        "更新在保留之前都经过检查，因此是别的东西写了这块内存：比特翻转、设备故障、误共享的缓冲区，或越界写入的算子。",
        (
            "本次训练无需处理：该张量取自较早的状态，或其矩重新开始",
            "更换硬件之前，先查看机器的错误计数（nvidia-smi -q 中的 ECC；dmesg 中的 Xid、EDAC）",
            "在脚本中：查找写入参数 .data、或跨步保留其视图的代码",
        ),
    ),
)
CODES = (CAUSE,)
FAULT_CLASS = "T"
REMEDIES = ("retry", "repair_tensor", "reset_moments", "roll_back")


def weigh(case: Case) -> Weight | None:
    """Named by the scan, where a tensor had been good; by fresh moments, where the state is finite; and by the replay,
    where an update that was undone is sound after a redo of the steps before.
    """
    gone = _mended_by_going_back(case)
    if gone is not None:
        return gone
    bad = _went_bad(case) or _changed(case)
    if case.good("reference_optimizer") and not bad:
        return None  # the plain formula makes a good update of the very same moments: not they are wrong
    moments = case.trigger in (Trigger.UPDATE, Trigger.OUTLIER, Trigger.RUNAWAY)
    reasons = Reasons()
    reasons.proof(case.good("redone_state"), "redone_state", 0.95)
    reasons.proof(bool(_went_bad(case)), "scan_state", 0.85)
    reasons.proof(moments and case.good("fresh_moments"), "fresh_moments", 0.7)
    reasons.hint(bool(bad) and case.good("older_weights"), "older_weights", 0.4)
    # fp16 weights are spoilt by their own updates as a rule; only a tensor that nothing writes is another matter.
    own = case.has_half_weights and not all(_is_frozen(s) or s.kind == "moment" for s in bad)
    reasons.against(own, "facts", REFUTED)
    reasons.against(case.good("adam_eps"), "adam_eps", 0.2)
    reasons.against(case.good("fp32") and not bad, "fp32", 0.4)
    reasons.against(case.good("lower_lr"), "lower_lr", 0.5)
    reasons.against(case.bad("fresh_moments") and not bad, "fresh_moments", 0.2)
    worst = bad[0] if bad else signs.first(case, "moment", "parameter")
    return reasons.weight(
        worst.name if worst is not None else case.finding.where,
        names=signs.listed(s.name for s in bad) if bad else signs.shown(worst.name if worst is not None else None),
        since_step=signs.shown(signs.since(worst) if worst is not None else None),
        index=signs.shown(signs.of(worst, "index")),
        value=signs.shown(signs.of(worst, "value")),
        was=signs.shown(signs.of(worst, "was")),
    )


def _mended_by_going_back(case: Case) -> Weight | None:
    """An update that failed is sound from the state that was computed anew: the state it found was another one.

    Loss and gradients were finite and the optimizer's code is the same, so the values were in the memory before, or
    were put there while the update ran.
    """
    if case.trigger is not Trigger.UPDATE or case.verdict is not Verdict.NOT_REPRODUCED:
        return None
    told = [s for s in case.suspects_of("moment", "parameter") if s.data.get("what") == "undone"]
    moments = signs.strings(case.finding.data.get("moments"))
    names = tuple(s.name for s in told) or moments or signs.strings([case.finding.data.get("first")])
    where = names[0] if names else case.finding.where
    reasons = Reasons()
    reasons.proof(True, "verdict", 0.97)
    return reasons.weight(
        where,
        names=signs.listed(names or (where,)),
        since_step=signs.shown(case.reading.step),
        index=signs.shown(signs.of(told[0] if told else None, "index")),
        value=signs.shown(signs.of(told[0] if told else None, "value")),
        was=signs.shown(signs.of(told[0] if told else None, "was")),
    )


def _changed(case: Case) -> list[Suspect]:
    """Tensors that come out otherwise when the steps before the failure are computed again."""
    if not case.good("redone_state"):
        return []
    return [s for s in case.suspects_of("moment", "parameter") if s.data.get("what") == "changed"]


def _went_bad(case: Case) -> list[Suspect]:
    """Bad tensors with a good past. A moment has none before training: that it is bad is enough."""
    gone_bad = signs.went_bad(case)
    return [s for s in signs.bad_state(case) if s in gone_bad or s.kind == "moment"]


def _is_frozen(suspect: Suspect) -> bool:
    return suspect.kind == "buffer" or suspect.data.get("frozen") is True
