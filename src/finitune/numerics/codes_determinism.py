"""Codes of determinism: what does not repeat bit for bit, and why."""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity

NOT_REPEATED = Code(
    "NUM110",
    Severity.WARNING,
    Text(
        "the step does not repeat bit for bit",
        "step {step} was computed twice on the same state: the loss is {was} and {now}; {num} of {total} gradients "
        "differ, in model order from {first} to {last}; first module whose output differs: {module}.",
        "A resumed, redone or replayed step will not be exact with this model on this device, and an incident may be "
        "called not reproducible. Where the losses or a module's outputs differ, the forward pass does: random "
        "numbers from a generator of the model's own, a clock, a counter, other threads that change weights. Where "
        "only gradients differ it is most often the backward pass, behind the last of them in model order: a kernel "
        "that adds in no fixed order, usually.",
        (
            "look for random numbers, clocks and state kept over steps in the code of that module",
            "leave guard.deterministic=true, and see which operations NUM111 names",
            "train on: nothing is wrong with the numbers themselves; guard.repeat_check=false leaves this check out",
        ),
    ),
    Text(
        "该步无法逐比特重现",
        "第 {step} 步在同一状态上计算了两次：损失为 {was} 和 {now}；"
        "{total} 个梯度中有 {num} 个不同，按模型顺序从 {first} 到 {last}；输出首先不同的模块：{module}。",
        "在此设备上，该模型恢复、重做或回放的步不会完全一致，故障也可能被判为不可重现。若损失或某模块的输出不同，原因在前向："
        "模型自带的随机数生成器、时钟、计数器，或其他线程改动了权重。若只有梯度不同，原因多半在反向，位于按模型顺序最后一个不同的梯度之后："
        "通常是加法顺序不固定的内核。",
        (
            "检查该模块代码中的随机数、时钟以及跨步保存的状态",
            "保持 guard.deterministic=true，并查看 NUM111 指出的运算",
            "继续训练：数值本身没有问题；guard.repeat_check=false 可省去此检查",
        ),
    ),
)

NO_DETERMINISTIC_KERNEL = Code(
    "NUM111",
    Severity.WARNING,
    Text(
        "an operation has no deterministic kernel",
        "torch has no deterministic kernel for {operation} on this device.",
        "It adds in no fixed order, so its last bits may change from one call to the next, and so may every step that "
        "uses it: resume and redo are then not exact. From here on the attention kernels are not deterministic "
        "either, for torch makes them so only where no operation lacks such a kernel.",
        (
            "train on: the differences are of the size of rounding",
            "where exact repetition matters, compute this operation in another way, or on the CPU",
        ),
    ),
    Text(
        "某个运算没有确定性内核",
        "torch 在此设备上没有 {operation} 的确定性内核。",
        "它的加法顺序不固定，每次调用的末位可能不同，使用它的每一步也可能不同：恢复和重做因而不再精确。"
        "从此注意力内核也不再是确定性的，因为 torch 只在所有运算都有此类内核时才启用它们。",
        ("继续训练：差异只有舍入误差的大小", "若需要精确重现，请换一种方式计算该运算，或在 CPU 上计算"),
    ),
)

NO_WORKSPACE_SETTING = Code(
    "NUM112",
    Severity.WARNING,
    Text(
        "cuBLAS was not asked for deterministic products",
        "{variable} is {setting}; a deterministic setting is {wanted}.",
        "cuBLAS reads it once, when the GPU is first used in a process; that had happened before this run, or the "
        "variable was set to something else. Matrix products may then differ in their last bits from run to run.",
        ("set {variable}={wanted} in the environment and start again",),
    ),
    Text(
        "未要求 cuBLAS 使用确定性乘法",
        "{variable} 为 {setting}；确定性的设置是 {wanted}。",
        "cuBLAS 只在进程首次使用 GPU 时读取它一次；那在本次运行之前就发生了，或者该变量被设为别的值。"
        "矩阵乘法的末位可能因此在各次运行之间不同。",
        ("在环境中设置 {variable}={wanted} 后重新开始",),
    ),
)

THREADS_CHANGED = Code(
    "NUM113",
    Severity.WARNING,
    Text(
        "the number of threads changed during the run",
        "torch computed with {was} threads, and now with {now}.",
        "Sums are split over threads, so their number is part of every result. Steps from here on repeat only with "
        "{now} threads, those before only with {was}: redo and resume across this point are not exact.",
        ("set OMP_NUM_THREADS before the run and do not call torch.set_num_threads during it",),
    ),
    Text(
        "线程数在运行中改变",
        "torch 先用 {was} 个线程计算，现在用 {now} 个。",
        "求和会分到各线程，线程数是每个结果的一部分。此后的步只能用 {now} 个线程重现，此前的只能用 {was} 个："
        "跨越此处的重做和恢复不再精确。",
        ("在运行前设置 OMP_NUM_THREADS，运行中不要调用 torch.set_num_threads",),
    ),
)

CODES: tuple[Code, ...] = (NOT_REPEATED, NO_DETERMINISTIC_KERNEL, NO_WORKSPACE_SETTING, THREADS_CHANGED)
