"""Codes of the time machine: steps that do not come out again, bases that are gone, trust."""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity

NOT_REPRODUCED = Code(
    "NUM120",
    Severity.ERROR,
    Text(
        "a step did not come out again",
        "step {step}, done again from a stored state, differs in {what}: journalled {was}, now {now}.",
        "Everything random in a step is seeded by its number, so the same state and batch give the same bits. Where "
        "they do not, a race, an unseeded random choice in the model's code, another number of threads or the hardware "
        "is at work. Data and learning rate are not to blame.",
        (
            "check the model's own code for random numbers and clocks; run with guard.repeat_check=true",
            "use the number of threads of the first run (OMP_NUM_THREADS)",
            "on an accelerator: guard.deterministic=true; if it stays, test the memory of the machine",
        ),
    ),
    Text(
        "某一步无法重现",
        "从已存状态重做第 {step} 步，{what} 不同：日志中为 {was}，现在为 {now}。",
        "每一步的随机性都由步号决定，相同的状态和批次应得到相同的比特。若不同，则存在竞争、模型代码中未设种子的随机、线程数不同或硬件故障，"
        "与数据和学习率无关。",
        (
            "检查模型自身代码中的随机数和时钟；使用 guard.repeat_check=true",
            "使用与首次运行相同的线程数（OMP_NUM_THREADS）",
            "在加速器上：guard.deterministic=true；若仍如此，请检测机器内存",
        ),
    ),
)

STEP_UNREACHABLE = Code(
    "SYS012",
    Severity.ERROR,
    Text(
        "the state of a step cannot be reached",
        "step {step}: {reason} ({journal}).",
        "A step's state is rebuilt from the nearest snapshot or checkpoint before it and the journal between the two; "
        "one of them is missing.",
        ("choose a step that the journal has", "keep more checkpoints: save_total_limit, save_keep_every_steps"),
    ),
    Text(
        "无法到达某一步的状态",
        "第 {step} 步：{reason}（{journal}）。",
        "某步的状态由之前最近的快照或检查点加上其间的日志重建；两者之一缺失。",
        ("选择日志中有的步", "保留更多检查点：save_total_limit、save_keep_every_steps"),
    ),
)

BASE_DAMAGED = Code(
    "SYS013",
    Severity.WARNING,
    Text(
        "a stored state is damaged and was passed over",
        "the state stored at step {step} no longer has the bits that were stored.",
        "Memory or disk changed it; the next older one is used instead.",
        ("nothing to do for this run", "test the machine's memory if this repeats"),
    ),
    Text(
        "某个已存状态已损坏，已跳过",
        "第 {step} 步存下的状态已不是当时的比特。",
        "内存或磁盘改变了它；改用更早的状态。",
        ("本次运行无需处理", "若反复出现，请检测机器内存"),
    ),
)

NO_SNAPSHOTS = Code(
    "SYS014",
    Severity.NOTE,
    Text(
        "no snapshots are kept in memory",
        "one takes {needed}; the budget is {budget} ({free} free, snapshots.memory_share={share}).",
        "Going back to an earlier step then starts at a checkpoint on disk or at the start of the run: slower, and as "
        "exact.",
        (
            "raise snapshots.memory_share, or use LoRA: its snapshots are small",
            "write checkpoints more often: save_steps",
        ),
    ),
    Text(
        "内存中不保留快照",
        "一个快照需要 {needed}；预算为 {budget}（空闲 {free}，snapshots.memory_share={share}）。",
        "回到较早的步时将从磁盘上的检查点或运行起点开始：较慢，但同样精确。",
        ("增大 snapshots.memory_share，或使用 LoRA：其快照很小", "更频繁地写检查点：save_steps"),
    ),
)

SAVE_RETRY = Code(
    "SYS015",
    Severity.WARNING,
    Text(
        "a failed save will be tried again",
        "the checkpoint of step {step} could not be written ({error}); the next try is after step {retry}.",
        "The training itself is not touched by this. Until a save succeeds, a crash costs the steps since step {last}.",
        ("make room, or make the folder writable again ({free} free, about {needed} needed)",),
    ),
    Text(
        "失败的保存将重试",
        "第 {step} 步的检查点无法写入（{error}）；将在第 {retry} 步之后重试。",
        "训练本身不受影响。在保存成功之前，崩溃会损失自第 {last} 步以来的训练。",
        ("腾出空间，或恢复目录的写权限（剩余 {free}，约需 {needed}）",),
    ),
)

STOPPED_UNSAVED = Code(
    "SYS016",
    Severity.ERROR,
    Text(
        "stopped, and the last steps could not be saved",
        "stopped after step {step} of {total}; the newest checkpoint is of step {last}.",
        "The disk refused the last save. What is lost is time: a resumed run trains the steps since then again and "
        "comes to the same bits.",
        ("make room on the disk, then: finitune train --resume {run}",),
    ),
    Text(
        "已停止，最后几步未能保存",
        "在第 {step} 步（共 {total} 步）之后停止；最新的检查点是第 {last} 步的。",
        "磁盘拒绝了最后一次保存。损失的只是时间：恢复的运行会重新训练其后的步，并得到相同的比特。",
        ("腾出磁盘空间后运行：finitune train --resume {run}",),
    ),
)

CODES = (NOT_REPRODUCED, STEP_UNREACHABLE, BASE_DAMAGED, NO_SNAPSHOTS, SAVE_RETRY, STOPPED_UNSAVED)
