"""Codes of the guard's own verdicts: an update that spoilt the state, and a halt after an investigation."""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity

UPDATE_NOT_FINITE = Code(
    "NUM103",
    Severity.ERROR,
    Text(
        "the update made the training state non-finite",
        "The loss ({loss}) and the gradients of step {step} were finite, but the update made {count} tensors of "
        "weights or moments non-finite, first {first}. State tensors that were written between the last step and this "
        "one: {written}.",
        "The optimizer itself made the NaN or inf: its eps vanishes in half precision, a moment was corrupt, or the "
        "update left the range of the weights. Loss and gradient norm would have shown it one step too late. The "
        "update was undone.",
        (
            "with fp16 weights: keep the trainable weights in fp32 (precision: fp16 or bf16, not fp16-pure)",
            "if it must be fp16 weights: an Adam eps of 1e-4 or more",
            "if something was written between the steps: look at what runs there (callbacks, averages, loading)",
            "if the weights are fp32 and nothing was written: look at the optimizer, and at the machine's memory",
        ),
    ),
    Text(
        "更新使训练状态变为非有限值",
        "第 {step} 步的损失（{loss}）和梯度都有限，但更新使 {count} 个权重或矩张量变成非有限值，第一个是 {first}。"
        "上一步与这一步之间被写入的状态张量：{written}。",
        "NaN 或 inf 是优化器自己产生的：eps 在半精度中变为 0、某个矩已损坏，或更新超出了权重的范围。"
        "损失和梯度范数要晚一步才会显示出来。该更新已被撤销。",
        (
            "若权重为 fp16：可训练权重保持 fp32（precision: fp16 或 bf16，而不是 fp16-pure）",
            "若必须使用 fp16 权重：Adam 的 eps 取 1e-4 或更大",
            "若两步之间有写入：检查在那里运行的代码（回调、滑动平均、加载）",
            "若权重为 fp32 且没有写入：检查优化器，以及机器的内存",
        ),
    ),
)

INCIDENT_HALT = Code(
    "NUM104",
    Severity.ERROR,
    Text(
        "halted: no plan held for an incident",
        "Incident {number}: step {step} failed ({trigger}); the cause is {cause}. {tried} plans were tried on a replay "
        "and none may be applied: they did not hold, or had been applied before and the failure came back; {replays} "
        "replays were used.",
        "A cure that was not proved is not applied, and the run does not go on with a failure that is not understood. "
        "Weights and moments are those of before the step.",
        (
            "read the incident: finitune incidents RUN {number}",
            "read about the cause: finitune explain {cause}",
            "run it again elsewhere: finitune replay RUN/incidents/{folder}",
            "a larger budget: guard.max_replays",
        ),
    ),
    Text(
        "已停止：事件没有可行的方案",
        "事件 {number}：第 {step} 步失败（{trigger}）；原因是 {cause}。在重放中试验了 {tried} 个方案，"
        "没有一个可以采用（不成立，或先前用过而故障再次出现）；共用了 {replays} 次重放。",
        "未经证明的疗法不会被采用，原因不明的失败也不会被放过。权重和矩停在该步之前。",
        (
            "查看事件：finitune incidents RUN {number}",
            "了解原因：finitune explain {cause}",
            "在别处重放：finitune replay RUN/incidents/{folder}",
            "更大的预算：guard.max_replays",
        ),
    ),
)

CODES = (UPDATE_NOT_FINITE, INCIDENT_HALT)
