"""Codes of what the guard itself says: halts, refusals, and the machine under the run."""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity
from finitune.engine import codes_guard, codes_half, codes_incident, codes_time

TOO_MANY_ABORTS = Code(
    "NUM100",
    Severity.ERROR,
    Text(
        "halted: too many steps in a row were refused",
        "{count} steps in a row were refused at step {step}; the run stops here. The last reason was {reason}.",
        "When one batch after another fails, the model, the precision or the learning rate is at fault, not the data "
        "of one batch. The weights are those of the last good step: {updates} updates, all finite.",
        (
            "read the findings of the last steps in {journal} (`finitune explain {reason}`)",
            "with fp16: run again with precision=bf16, or precision=fp32 on a machine without bf16",
            "go on from the last checkpoint with a smaller learning rate: learning_rate={half_lr}",
            "raise guard.max_aborts_in_a_row (now {limit}) only if the batches are known to be bad",
        ),
    ),
    Text(
        "已停止：连续多步被拒绝",
        "第 {step} 步为止连续 {count} 步被拒绝，运行在此停止。最后的原因是 {reason}。",
        "若一批接一批都失败，问题在于模型、精度或学习率，而不是某一批数据。权重停在最后一个正常步："
        "共 {updates} 次更新，全部有限。",
        (
            "在 {journal} 中查看最后几步的发现（`finitune explain {reason}`）",
            "使用 fp16 时：改用 precision=bf16；机器不支持 bf16 时改用 precision=fp32",
            "从最后的检查点以更小的学习率继续：learning_rate={half_lr}",
            "只有确知这些批次有问题时才增大 guard.max_aborts_in_a_row（当前 {limit}）",
        ),
    ),
)

STATE_NOT_FINITE = Code(
    "NUM101",
    Severity.ERROR,
    Text(
        "the training state is not finite",
        "{count} tensors of weights or optimizer moments are not finite at step {step}, first {first}.",
        "A non-finite state cannot train and must never be saved over a good one; no checkpoint was written.",
        (
            "go on from the last good checkpoint: finitune train --resume {run}",
            "if it comes back at the same step: precision=fp32, or a smaller learning_rate",
        ),
    ),
    Text(
        "训练状态中出现非有限值",
        "第 {step} 步有 {count} 个权重或优化器矩张量不是有限值，第一个是 {first}。",
        "非有限的状态无法继续训练，也绝不能覆盖好的状态；没有写入检查点。",
        (
            "从最后一个好的检查点继续：finitune train --resume {run}",
            "如果在同一步再次出现：使用 precision=fp32，或减小 learning_rate",
        ),
    ),
)

EVAL_NOT_FINITE = Code(
    "NUM102",
    Severity.WARNING,
    Text(
        "the held-out loss is not finite",
        "The held-out loss is {loss} after {step} steps ({num_rows} rows).",
        "Evaluation changes nothing, but a model that cannot be evaluated in this precision will soon not train in it: "
        "an activation overflowed, or a held-out row is broken.",
        (
            "with fp16: use precision: bf16 or precision: fp32",
            "if training losses are normal: look at the held-out rows",
        ),
    ),
    Text(
        "留出损失不是有限值",
        "第 {step} 步之后的留出损失为 {loss}（{num_rows} 行）。",
        "评估不会改变任何东西，但在这种精度下无法评估的模型很快也无法训练：某个激活溢出，或某条留出数据有问题。",
        ("使用 fp16 时：改用 precision: bf16 或 precision: fp32", "若训练损失正常：检查留出的数据行"),
    ),
)

NOTHING_LEARNT = Code(
    "OPT100",
    Severity.ERROR,
    Text(
        "halted: nothing is being learnt",
        "the weights have not moved in the last {count} measurements up to step {step} (changed: {changed}).",
        "Steps that change no weight cost time and teach nothing: a learning rate of 0, updates too small for the "
        "weights' format (bf16-pure), or no gradient reaching the trainable parameters.",
        (
            "check learning_rate ({lr}) and lr_scheduler_type",
            "with precision=bf16-pure use precision=bf16 (fp32 weights)",
            "check that lora.target_modules or freeze leave something to train",
        ),
    ),
    Text(
        "已停止：什么也没有学到",
        "截至第 {step} 步，最近 {count} 次测量中权重没有变化（变化比例：{changed}）。",
        "不改变权重的步只耗时间：学习率为 0、更新量小于权重格式的精度（bf16-pure），或可训练参数得不到梯度。",
        (
            "检查 learning_rate（{lr}）和 lr_scheduler_type",
            "若 precision=bf16-pure，请改用 precision=bf16（权重为 fp32）",
            "检查 lora.target_modules 或 freeze 是否还留有可训练的部分",
        ),
    ),
)

SAVE_FAILED = Code(
    "SYS001",
    Severity.ERROR,
    Text(
        "a save failed",
        "{path} could not be written: {error}.",
        "Usually a full disk, a read-only folder or a vanished mount. Nothing that was saved before is touched, and no "
        "half-written folder is left.",
        (
            "make room ({free} free, about {needed} needed) or choose another output_dir",
            "the run goes on and tries again at the next save",
        ),
    ),
    Text(
        "保存失败",
        "无法写入 {path}：{error}。",
        "通常是磁盘已满、目录只读或挂载消失。之前保存的内容没有被触动，也没有留下写了一半的目录。",
        (
            "腾出空间（剩余 {free}，约需 {needed}）或更换 output_dir",
            "运行会继续，并在下一次保存时重试",
        ),
    ),
)

FINAL_SAVE_FAILED = Code(
    "SYS002",
    Severity.ERROR,
    Text(
        "the final save failed",
        "the trained model could not be written to {path}: {error}.",
        "The training itself is complete, but its result is only as safe as the last checkpoint: {last}.",
        ("make room, then: finitune train --resume {run} (it goes on from the last checkpoint and saves again)",),
    ),
    Text(
        "最终保存失败",
        "训练好的模型无法写入 {path}：{error}。",
        "训练本身已完成，但结果只保存到最后一个检查点：{last}。",
        ("腾出空间后运行：finitune train --resume {run}（从最后的检查点继续并再次保存）",),
    ),
)

OUTPUT_NOT_EMPTY = Code(
    "SYS003",
    Severity.ERROR,
    Text(
        "the output folder is not empty",
        "{path} already holds {count} entries ({first}).",
        "A run never writes into the results of another.",
        (
            "choose another output_dir, or leave it at auto",
            "go on with the run that is there: finitune train --resume {path}",
            "start anew in the same place: overwrite_output_dir=true (moves the old content aside)",
        ),
    ),
    Text(
        "输出目录不为空",
        "{path} 中已有 {count} 项（{first}）。",
        "一次运行绝不会写入另一次运行的结果。",
        (
            "更换 output_dir，或保留 auto",
            "继续已有的运行：finitune train --resume {path}",
            "在原处重新开始：overwrite_output_dir=true（旧内容会被移到一旁）",
        ),
    ),
)

OUTPUT_UNUSABLE = Code(
    "SYS004",
    Severity.ERROR,
    Text(
        "the output folder cannot be used",
        "{path}: {error}.",
        "A run needs a folder it can write to before it starts, or its work would be lost.",
        ("choose another output_dir", "check permissions and free space of the folder"),
    ),
    Text(
        "输出目录不可用",
        "{path}：{error}。",
        "运行开始之前必须有可写的目录，否则成果会丢失。",
        ("更换 output_dir", "检查目录的权限和剩余空间"),
    ),
)

RESUME_IMPOSSIBLE = Code(
    "SYS005",
    Severity.ERROR,
    Text(
        "there is nothing to resume from",
        "{path}: {reason}.",
        "A run is resumed from the newest checkpoint whose sizes and digests agree with its manifest.",
        ("list what is there: the folder of a run holds recipe.yaml, journal.jsonl and checkpoint-N", "start anew"),
    ),
    Text(
        "没有可恢复的内容",
        "{path}：{reason}。",
        "恢复时使用大小和摘要都与清单一致的最新检查点。",
        ("检查目录：运行目录中应有 recipe.yaml、journal.jsonl 和 checkpoint-N", "重新开始"),
    ),
)

CHECKPOINT_BAD = Code(
    "SYS006",
    Severity.WARNING,
    Text(
        "a checkpoint is damaged and was passed over",
        "{path}: {faults}.",
        "Its files do not agree with its manifest: torn by a crash, changed, or a fault of the disk.",
        ("nothing to do: the newest intact checkpoint is used", "check the disk if this repeats"),
    ),
    Text(
        "检查点已损坏，已跳过",
        "{path}：{faults}。",
        "其文件与清单不一致：因崩溃而残缺、被改动，或磁盘故障。",
        ("无需处理：使用最新的完好检查点", "若反复出现，请检查磁盘"),
    ),
)

MEMORY_SHORT = Code(
    "SYS007",
    Severity.WARNING,
    Text(
        "the run may not fit into memory",
        "about {needed} are needed, {free} are free.",
        "Weights, gradients, optimizer moments and activations live in memory together.",
        (
            "smaller per_device_train_batch_size (now {batch}) with more gradient_accumulation_steps",
            "gradient_checkpointing=true, or a smaller data.max_length ({length})",
            "LoRA instead of a full fine-tune",
        ),
    ),
    Text(
        "内存可能不足",
        "约需 {needed}，可用 {free}。",
        "权重、梯度、优化器矩和激活同时占用内存。",
        (
            "减小 per_device_train_batch_size（当前 {batch}）并增大 gradient_accumulation_steps",
            "gradient_checkpointing=true，或减小 data.max_length（{length}）",
            "使用 LoRA 而不是全量微调",
        ),
    ),
)

INTERRUPTED = Code(
    "SYS008",
    Severity.NOTE,
    Text(
        "interrupted on request",
        "stopped after step {step} of {total}; everything up to this step is saved in {path}.",
        "A signal asked the run to stop. The step at hand was finished first.",
        ("go on where it stopped: finitune train --resume {run}",),
    ),
    Text(
        "按要求中断",
        "在第 {step} 步（共 {total} 步）之后停止；到此为止的一切都保存在 {path}。",
        "收到停止信号，当前步已先完成。",
        ("从停下的地方继续：finitune train --resume {run}",),
    ),
)

OBSERVER_FAILED = Code(
    "SYS009",
    Severity.WARNING,
    Text(
        "an observer failed and was switched off",
        "{name}: {error}.",
        "Displays and trackers only watch; a fault in one must not touch the training.",
        ("training goes on without it", "remove it from report_to, or repair what the message names"),
    ),
    Text(
        "一个观察者出错，已停用",
        "{name}：{error}。",
        "显示和跟踪只是旁观，其错误不应影响训练。",
        ("训练在没有它的情况下继续", "从 report_to 中移除，或修复消息所指的问题"),
    ),
)

JOURNAL_LOST = Code(
    "SYS010",
    Severity.ERROR,
    Text(
        "halted: the journal cannot be written",
        "{path}: {error}.",
        "The journal is the run's truth; a run that cannot write it cannot be resumed or explained, so it stops at the "
        "last good step.",
        ("make room on the disk, then: finitune train --resume {run}",),
    ),
    Text(
        "已停止：无法写入日志",
        "{path}：{error}。",
        "日志是运行的唯一依据；写不了日志的运行无法恢复或解释，因此停在最后一个正常步。",
        ("腾出磁盘空间后运行：finitune train --resume {run}",),
    ),
)

MISSING_PACKAGE = Code(
    "SYS011",
    Severity.ERROR,
    Text(
        "a tracker needs a package that is not installed",
        "{name} needs the package {package}.",
        "Trackers of other tools are optional and come with extras.",
        ("pip install 'finitune[{name}]'", "or remove {name} from report_to; report_to: [csv] needs nothing"),
    ),
    Text(
        "跟踪器需要的软件包没有安装",
        "{name} 需要软件包 {package}。",
        "其他工具的跟踪器是可选的，随附加依赖安装。",
        ("pip install 'finitune[{name}]'", "或从 report_to 中移除 {name}；report_to: [csv] 不需要任何依赖"),
    ),
)

CODES = (
    TOO_MANY_ABORTS,
    STATE_NOT_FINITE,
    EVAL_NOT_FINITE,
    NOTHING_LEARNT,
    SAVE_FAILED,
    FINAL_SAVE_FAILED,
    OUTPUT_NOT_EMPTY,
    OUTPUT_UNUSABLE,
    RESUME_IMPOSSIBLE,
    CHECKPOINT_BAD,
    MEMORY_SHORT,
    INTERRUPTED,
    OBSERVER_FAILED,
    JOURNAL_LOST,
    MISSING_PACKAGE,
    *codes_time.CODES,
    *codes_guard.CODES,
    *codes_incident.CODES,
    codes_half.HALF_UNDER_SCALER,
)
