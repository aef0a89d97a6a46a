"""Codes of the adapters: what a bare training loop may hand over, and what of it limits the guard."""

from __future__ import annotations

from finitune.adapters import codes_ranks, codes_script
from finitune.core.codes import Code, Text
from finitune.core.types import Severity

LOSS_UNUSABLE = Code(
    "SYS420",
    Severity.ERROR,
    Text(
        "the loss function gives no loss",
        "micro-batch {micro}: {problem}. A loss is one floating-point number with a graph.",
        "The guard calls backward on it, as the loop would. Nothing was computed: weights, optimizer and generators "
        "are as before the step.",
        (
            "return the mean loss of the micro-batch: a tensor with one element, or an object with .loss",
            "do not call .item(), .detach() or .backward() inside loss_fn, nor compute it under torch.no_grad()",
        ),
    ),
    Text(
        "损失函数没有给出损失",
        "微批次 {micro}：{problem}。损失应是一个带计算图的浮点数。",
        "守护器会像普通循环那样对它做反向传播。什么都没有计算：权重、优化器和随机数生成器都与该步之前相同。",
        (
            "返回该微批次的平均损失：只有一个元素的张量",
            "不要在 loss_fn 里调用 .item()、.detach() 或 .backward()，也不要放在 torch.no_grad() 下",
        ),
    ),
)

CLOSURE_OPTIMIZER = Code(
    "SYS421",
    Severity.ERROR,
    Text(
        "this optimizer computes the loss itself",
        "{optimizer} calls a closure for the loss in its step, as often as it likes.",
        "A step is judged between backward and update. With a closure the weights move before anybody can look.",
        ("use an optimizer that takes gradients as they are: AdamW, SGD, Adafactor, Lion, Muon, ...",),
    ),
    Text(
        "该优化器自己计算损失",
        "{optimizer} 在 step 中会任意多次调用闭包来计算损失。",
        "每一步都在反向传播与更新之间判定。使用闭包时，权重在任何人查看之前就已改变。",
        ("使用直接采用现有梯度的优化器：AdamW、SGD、Adafactor、Lion、Muon 等",),
    ),
)

SPARSE_GRADIENT = Code(
    "SYS422",
    Severity.ERROR,
    Text(
        "a gradient is sparse",
        "The gradient of {name} is a sparse tensor.",
        "Norms, clipping and the look for NaN work on dense gradients. They were dropped, nothing was updated.",
        ("nn.Embedding(..., sparse=False), and a dense optimizer for it",),
    ),
    Text(
        "梯度是稀疏的",
        "{name} 的梯度是稀疏张量。",
        "范数、裁剪和 NaN 检查只适用于稠密梯度。梯度已丢弃，没有任何更新。",
        ("使用 nn.Embedding(..., sparse=False)，并为它使用稠密优化器",),
    ),
)

BAD_ARGUMENT = Code(
    "SYS425",
    Severity.ERROR,
    Text(
        "an argument of the guard cannot be",
        "{name}: {problem}.",
        "Nothing was begun.",
        ("{cure}",),
    ),
    Text("守护器的参数无效", "{name}：{problem}。", "什么都没有开始。", ("{cure}",)),
)

NO_PLACE_FOR_STATES = Code(
    "SYS426",
    Severity.WARNING,
    Text(
        "no memory for snapshots: failures are refused, not cured",
        "A copy of weights and optimizer state takes about {needed}; memory_share={share} of the free memory is "
        "{budget}.",
        "Without a copy nothing can be undone. Steps that are not finite are still refused before they touch the "
        "weights, but they are not investigated, and an update that spoils the weights can only be stopped at.",
        ("a larger memory_share", "train fewer weights (LoRA): their copies are small"),
    ),
    Text(
        "没有内存用于快照：故障只会被拒绝，不会被治愈",
        "权重和优化器状态的一份副本约需 {needed}；空闲内存的 memory_share={share} 为 {budget}。",
        "没有副本就无法撤销。非有限的步仍会在触及权重之前被拒绝，但不会被调查；破坏权重的更新只能停下。",
        ("增大 memory_share", "训练更少的权重（LoRA）：其副本很小"),
    ),
)

LOSS_CHANGES_MODEL = Code(
    "SYS427",
    Severity.WARNING,
    Text(
        "the forward pass changes the model: steps cannot be replayed",
        "{count} tensors changed while the loss of step {step} was computed, first {name}.",
        "A replay would change them again, and no longer be the same step. Failures are refused as ever, but "
        "not investigated.",
        (
            "count and collect outside of loss_fn",
            "keep what a forward pass collects out of buffers; running statistics of BatchNorm are understood",
        ),
    ),
    Text(
        "前向传播会改变模型：各步无法重放",
        "计算第 {step} 步的损失时有 {count} 个张量被改变，第一个是 {name}。",
        "重放会再次改变它们，就不再是同一步。故障仍会被拒绝，但不会被调查。",
        ("在 loss_fn 之外计数和收集", "不要把前向传播收集的内容放进缓冲区；BatchNorm 的统计量可以处理"),
    ),
)

BAD_AT_START = Code(
    "SYS428",
    Severity.ERROR,
    Text(
        "weights are not finite before the first step",
        "{count} tensors of weights or optimizer state are not finite at the start, first {first}.",
        "No step can be finite that uses them. The guard did not make them, and does not hold them against an update.",
        ("load the weights again and look at the file", "check how {first} was initialised"),
    ),
    Text(
        "第一步之前权重就不是有限的",
        "开始时有 {count} 个权重或优化器状态张量不是有限的，第一个是 {first}。",
        "用到它们的步不可能是有限的。它们不是守护器造成的，也不会归咎于某次更新。",
        ("重新加载权重并检查文件", "检查 {first} 是如何初始化的"),
    ),
)

CLOSED = Code(
    "SYS429",
    Severity.ERROR,
    Text(
        "there is no step to be made",
        "guard.step() was called with {what}.",
        "Nothing was computed.",
        ("call guard() again for another run", "give a batch, or a list of at least one micro-batch"),
    ),
    Text(
        "没有可执行的步",
        "guard.step() 被调用时{what}。",
        "什么都没有计算。",
        ("再次调用 guard() 开始另一次运行", "给出一个批次，或至少含一个微批次的列表"),
    ),
)

QUARANTINED_BATCH = Code(
    "SYS423",
    Severity.NOTE,
    Text(
        "all rows of a batch are in quarantine",
        "Step {step}: all {count} rows were left out before; there is nothing to compute.",
        "Rows that made a step fail are left out wherever they come up again.",
        ("look at the rows of the incident, and take them out of the data",),
    ),
    Text(
        "一个批次的所有数据行都在隔离中",
        "第 {step} 步：全部 {count} 行此前已被排除，没有可计算的内容。",
        "曾使某步失败的数据行再次出现时都会被排除。",
        ("查看事件中的数据行，并把它们从数据中去掉",),
    ),
)

NOT_LOOKED = Code(
    "SYS432",
    Severity.NOTE,
    Text(
        "a look at the run could not be made",
        "The look at {look} was given up: {error}.",
        "What it would have found is not known. The run itself is not touched by it.",
        ("nothing has to be done; the steps themselves are judged all the same",),
    ),
    Text(
        "有一项对运行的检查没有做成",
        "对 {look} 的检查已放弃：{error}。",
        "它本来会发现什么不得而知。运行本身不受影响。",
        ("无需处理；每一步照常判定",),
    ),
)

CODES = (
    NOT_LOOKED,
    QUARANTINED_BATCH,
    LOSS_UNUSABLE,
    CLOSURE_OPTIMIZER,
    SPARSE_GRADIENT,
    BAD_ARGUMENT,
    NO_PLACE_FOR_STATES,
    LOSS_CHANGES_MODEL,
    BAD_AT_START,
    CLOSED,
    *codes_script.CODES,
    *codes_ranks.CODES,
)
