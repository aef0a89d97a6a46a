"""Codes of a guarded script that runs on several ranks."""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity

OTHER_RANK_FAILED = Code(
    "DST410",
    Severity.ERROR,
    Text(
        "the loss function failed on another rank",
        "rank {rank}: {error}.",
        "All ranks refuse the batch together before a gradient is exchanged, so nobody waits for a rank that does not "
        "come. Weights, optimizer and generators are as before the step on every rank.",
        (
            "look at what rank {rank} raised, and at its batch",
            "go on with the next batch on all ranks: the guards are in step",
            "an error in backward, or in collectives of the loss function itself, cannot be agreed upon: there the "
            "timeout of the process group counts",
        ),
    ),
    Text(
        "另一进程上的损失函数出错",
        "进程 {rank}：{error}。",
        "在交换梯度之前，所有进程一起放弃该批次，因此没有人会等待不来的进程。"
        "每个进程上的权重、优化器和随机数生成器都与该步之前相同。",
        (
            "查看进程 {rank} 抛出的错误及其批次",
            "所有进程继续下一个批次：各守护器保持同步",
            "反向传播中的错误，或损失函数自身集合通信中的错误无法协商：此时由进程组的超时决定",
        ),
    ),
)

NOTHING_TO_STAND_IN = Code(
    "DST411",
    Severity.ERROR,
    Text(
        "a rank has nothing to compute, and nothing that can stand in",
        "rank {rank} has {count} micro-batches in step {step}, another rank has {most}.",
        "Every rank has to take part in the exchange of gradients. A batch that went well before stands in with a "
        "weight of 0; there is none yet.",
        ("hand over the same number of micro-batches on every rank",),
    ),
    Text(
        "某个进程没有可计算的内容，也没有可替代的批次",
        "第 {step} 步中进程 {rank} 有 {count} 个微批次，而另一进程有 {most} 个。",
        "每个进程都必须参加梯度交换。此前正常的批次可以以权重 0 代替，但目前还没有。",
        ("在每个进程上交出相同数量的微批次",),
    ),
)

NOT_THE_SAME = Code(
    "DST412",
    Severity.WARNING,
    Text(
        "the gradients are not the same on all ranks",
        "Step {step}: the gradient norm is {least} on rank {least_rank} and {most} on rank {most_rank}, after the "
        "exchange.",
        "Replicas that are updated by different gradients drift apart, and each learns from its own rows only. The "
        "guard takes the worst of them for its verdict, on all ranks. Failures are refused on all ranks together, and "
        "are not investigated: ranks that differ cannot stand for each other.",
        (
            "wrap the model in DistributedDataParallel, and call the wrapped one in loss_fn",
            "if the script exchanges gradients itself: in hooks of the parameters, before loss.backward() returns",
            "under no_sync() gradients are not exchanged",
        ),
    ),
    Text(
        "各进程的梯度不同",
        "第 {step} 步：交换之后，梯度范数在进程 {least_rank} 上为 {least}，在进程 {most_rank} 上为 {most}。",
        "用不同梯度更新的副本会逐渐分离，每个只从自己的数据行学习。守护器在所有进程上取其中最差者作判定。故障会在所有进程上一起拒绝，但不作调查：互不相同的进程不能相互代替。",
        (
            "用 DistributedDataParallel 包装模型，并在 loss_fn 中调用包装后的模型",
            "若脚本自己交换梯度：在参数的钩子中进行，使 loss.backward() 返回之前完成",
            "在 no_sync() 之下不会交换梯度",
        ),
    ),
)

REPLICAS_DIFFER = Code(
    "DST413",
    Severity.ERROR,
    Text(
        "the replicas are not the same",
        "Before step {step}, {count} tensors differ between the ranks, first {first}{place}: {values}. "
        "Wrong: rank {wrong}.",
        "All ranks make the same updates from the same gradients, so their weights and moments have the same bits. "
        "Where they do not, something wrote into the memory of one rank, or its update was computed wrongly. With "
        "three ranks the many are right; of two, one that is not finite is wrong, and of two finite ones nobody can "
        "tell. Found after an update, all ranks take the state of the right one, of rank 0 where that cannot be told; "
        "with the policy observe nothing is changed.",
        (
            "look at the machine's error counters (nvidia-smi -q: ECC; dmesg: Xid, EDAC) of the rank that is named",
            "make sure that all ranks load the same weights, and that the script changes none of them on one rank only",
        ),
    ),
    Text(
        "各副本不一致",
        "第 {step} 步之前，各进程之间有 {count} 个张量不同，首先是 {first}{place}：{values}。出错的进程：{wrong}。",
        "所有进程用相同的梯度做相同的更新，因此权重和矩的比特应当相同。"
        "若不同，则是有东西写入了某个进程的内存，或其更新计算有误。"
        "三个及以上进程时以多数为准；两个时，非有限的一个是错的，都有限则无法判断。"
        "若在更新之后发现，所有进程采用正确者的状态，无法判断时采用进程 0 的状态；策略为 observe 时不作更改。",
        (
            "查看所指进程的机器错误计数（nvidia-smi -q 中的 ECC；dmesg 中的 Xid、EDAC）",
            "确保所有进程加载相同的权重，并且脚本不会只在一个进程上修改它们",
        ),
    ),
)

SHARDED = Code(
    "DST414",
    Severity.ERROR,
    Text(
        "the weights are sharded over ranks: not supported",
        "{name} and {count} parameters in all are DTensors (FSDP2, tensor parallelism).",
        "The guard compares, copies and repairs whole replicas. A shard's norm is not the gradient's, and a verdict "
        "from it would be wrong, so nothing is guarded rather than half of it.",
        ("use DistributedDataParallel where the model fits one device", "train without the guard"),
    ),
    Text(
        "权重分片在多个进程上：不支持",
        "{name} 等共 {count} 个参数是 DTensor（FSDP2、张量并行）。",
        "守护器比较、复制和修复的是完整的副本。分片的范数不是梯度的范数，由此作出的判定会是错的，因此宁可完全不守护。",
        ("模型放得进一个设备时使用 DistributedDataParallel", "不使用守护器训练"),
    ),
)

CODES = (OTHER_RANK_FAILED, NOTHING_TO_STAND_IN, NOT_THE_SAME, REPLICAS_DIFFER, SHARDED)
