"""Codes of a resume: what differs, and what is then not exact."""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity

CHANGED = Code(
    "SYS020",
    Severity.ERROR,
    Text(
        "the run would not go on as the same run",
        "not what the run was trained with up to step {step} (differences: {count}):{changes}",
        "A resume promises the bits of a run that was never stopped. With these changes it would be another run from "
        "here on, and nobody could tell later which part of it came from what.",
        (
            "go on as it was: leave the changes out (`finitune train --resume {run}` takes the stored recipe)",
            "go on all the same: add --allow-changes; what is then not exact is listed and journalled",
            "train with them from the start: finitune train {run}/recipe.yaml KEY=VALUE output_dir=NEW",
        ),
    ),
    Text(
        "恢复后将不再是同一次训练",
        "与训练到第 {step} 步时相比，有 {count} 处不同：{changes}",
        "恢复承诺得到与从未中断的训练逐位相同的结果。有了这些改动，从这里起就是另一次训练，以后也无法分清哪一部分由何而来。",
        (
            "照原样继续：去掉这些改动（`finitune train --resume {run}` 使用已存的配方）",
            "仍要继续：加上 --allow-changes；不再精确之处会列出并写入日志",
            "从头用新设置训练：finitune train {run}/recipe.yaml KEY=VALUE output_dir=NEW",
        ),
    ),
)

MISFIT = Code(
    "SYS021",
    Severity.ERROR,
    Text(
        "the checkpoint does not fit what is asked for",
        "the state in {point} is of other tensors (differences: {count}):{changes}",
        "A checkpoint holds the weights and moments of exactly one set of parameters and one optimizer. Other tensors "
        "would have to be made up, so no permission helps here.",
        (
            "go on as it was: leave these changes out (`finitune train --resume {run}` takes the stored recipe)",
            "start a new run from the trained weights: finitune export {point} NEW_MODEL, then "
            "finitune train {run}/recipe.yaml model.name_or_path=NEW_MODEL output_dir=NEW",
        ),
    ),
    Text(
        "检查点与所要求的设置不符",
        "{point} 中的状态属于其他张量；有 {count} 处与之不符：{changes}",
        "检查点保存的是某一组参数和某一个优化器的权重与矩。其他张量只能凭空捏造，因此即使允许改动也无济于事。",
        (
            "照原样继续：去掉这些改动（`finitune train --resume {run}` 使用已存的配方）",
            "从训练好的权重开始新的训练：finitune export {point} NEW_MODEL，"
            "然后 finitune train {run}/recipe.yaml model.name_or_path=NEW_MODEL output_dir=NEW",
        ),
    ),
)

CHANGES_ALLOWED = Code(
    "SYS022",
    Severity.WARNING,
    Text(
        "the run goes on with changes",
        "after step {step} it is trained otherwise, as --allow-changes permits (differences: {count}):{changes}\n"
        "    place in the data: the next batch is number {batch} of {batches} in epoch {epoch} of the rows as they are",
        "The result is no longer that of one recipe: neither the old nor the new one, run from the start, gives it.",
        ("the journal's resume record holds the changes; recipe.yaml is the recipe in force from now on",),
    ),
    Text(
        "训练将带着改动继续",
        "第 {step} 步之后的训练与之前不同（由 --allow-changes 允许，共 {count} 处）：{changes}\n"
        "    数据位置：下一批是按现有数据第 {epoch} 轮 {batches} 批中的第 {batch} 批",
        "结果不再对应单一配方：无论旧配方还是新配方，从头运行都得不到它。",
        ("日志的 resume 记录中有这些改动；recipe.yaml 是从现在起生效的配方",),
    ),
)

NOT_EXACT = Code(
    "SYS023",
    Severity.WARNING,
    Text(
        "the bits may differ from those of an undisturbed run",
        "it goes on after step {step}, but bit for bit is not promised (differences: {count}):{changes}",
        "Sums of floating-point numbers depend on their order, which libraries, thread counts and processors choose; "
        "the differences are of the size of rounding and grow from step to step.",
        ("for the same bits: the versions, threads (OMP_NUM_THREADS) and machine of before; else nothing to do",),
    ),
    Text(
        "结果可能与未受干扰的训练不逐位一致",
        "训练在第 {step} 步之后继续，但不保证逐位一致（{count} 处不同）：{changes}",
        "浮点数求和的结果取决于次序，而次序由软件库、线程数和处理器决定；差异为舍入量级，并逐步增大。",
        ("若要逐位一致：使用之前的版本、线程数（OMP_NUM_THREADS）和机器；否则无需处理",),
    ),
)

LENGTH_CHANGED = Code(
    "SYS024",
    Severity.NOTE,
    Text(
        "the length of the run was changed",
        "the run has {now} steps now, it had {was}; it stands at step {step}, so {left} are left",
        "",
        ("nothing to do: a run may be made longer or shorter at any time",),
    ),
    Text(
        "训练长度已改变",
        "训练现在共 {now} 步，原为 {was} 步；目前在第 {step} 步，还剩 {left} 步",
        "",
        ("无需处理：训练随时可以加长或缩短",),
    ),
)

RATE_JUMPS = Code(
    "SYS025",
    Severity.WARNING,
    Text(
        "the learning rate jumps",
        "at step {step} the learning rate jumps from {was_rate} (schedule of {was} steps) to {now_rate} ({now} steps).",
        "lr_scheduler_type={scheduler} spreads its course over the whole run, so another length is another rate at the "
        "same step. A rate that rises again late in a run can undo some of what was learnt.",
        (
            "keep the length: max_steps={was}",
            "for runs that may be made longer: lr_scheduler_type=constant_with_warmup, or warmup_stable_decay with the "
            "decay still ahead; their rate does not depend on the length until then",
            "watch the first losses; a smaller learning_rate (with --allow-changes) softens the jump",
        ),
    ),
    Text(
        "学习率发生跳变",
        "在第 {step} 步，学习率从 {was_rate}（按 {was} 步的计划）跳到 {now_rate}（按 {now} 步）。",
        "lr_scheduler_type={scheduler} 把变化分布在整个训练上，长度不同，同一步的学习率也不同。"
        "训练后期学习率回升可能会抹去一部分已学内容。",
        (
            "保持原长度：max_steps={was}",
            "可能会加长的训练：使用 lr_scheduler_type=constant_with_warmup，或衰减尚未开始的 warmup_stable_decay；"
            "在衰减之前其学习率与长度无关",
            "留意最初几步的损失；减小 learning_rate（配合 --allow-changes）可缓和跳变",
        ),
    ),
)

RESUMED = Code(
    "SYS026",
    Severity.NOTE,
    Text(
        "the run goes on",
        "goes on after step {step} of {total} ({point}); steps that are trained again: {again}",
        "",
        ("save_steps sets how many steps a crash can cost",),
    ),
    Text(
        "训练继续",
        "在第 {step} 步之后继续，共 {total} 步（{point}）；将重新训练的步数：{again}",
        "",
        ("save_steps 决定一次崩溃最多损失多少步",),
    ),
)

ALREADY_FINISHED = Code(
    "SYS027",
    Severity.NOTE,
    Text(
        "the run is finished",
        "all {steps} steps are trained and the result is whole: {final}. Nothing was done. "
        "To train further: finitune train --resume {run} max_steps={more}",
        "",
        ("talk to it: finitune chat {run}",),
    ),
    Text(
        "训练已完成",
        "全部 {steps} 步均已训练，结果完好：{final}。没有做任何事。"
        "要继续训练：finitune train --resume {run} max_steps={more}",
        "",
        ("与它对话：finitune chat {run}",),
    ),
)

OLDER_CHOSEN = Code(
    "SYS028",
    Severity.WARNING,
    Text(
        "the run goes back",
        "{path} was asked for, so the run goes back from step {last} to step {step}. No longer part of it: {newer}",
        "What was trained after the chosen checkpoint belongs to a line that the run leaves. Its checkpoints are "
        "renamed to abandoned-N-..., and removed when a later checkpoint is trusted.",
        (
            "to keep one of them: copy it elsewhere first",
            "to go on from the newest instead: finitune train --resume {run}",
        ),
    ),
    Text(
        "训练将退回",
        "指定了 {path}，因此训练从第 {last} 步退回到第 {step} 步。不再属于本次训练：{newer}",
        "所选检查点之后训练的内容属于被放弃的支线。其检查点改名为 abandoned-N-...，待以后的检查点可信后删除。",
        ("若要保留其中之一：先复制到别处", "若要改从最新的继续：finitune train --resume {run}"),
    ),
)

NO_EFFECT = Code(
    "SYS029",
    Severity.NOTE,
    Text(
        "some settings differ without touching the training",
        "differences that do not touch the training ({count}):{changes}",
        "",
        ("nothing to do",),
    ),
    Text(
        "有些设置不同，但不影响训练",
        "有 {count} 处不同，但不影响训练：{changes}",
        "",
        ("无需处理",),
    ),
)

CODES: tuple[Code, ...] = (
    CHANGED,
    MISFIT,
    CHANGES_ALLOWED,
    NOT_EXACT,
    LENGTH_CHANGED,
    RATE_JUMPS,
    RESUMED,
    ALREADY_FINISHED,
    OLDER_CHOSEN,
    NO_EFFECT,
)
