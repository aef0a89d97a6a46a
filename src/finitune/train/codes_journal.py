"""Codes of the journal: waiting for the disk, damaged lines, a vanished folder, the table made of it."""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity

JOURNAL_WAITS = Code(
    "SYS040",
    Severity.WARNING,
    Text(
        "the journal waits for the disk",
        "{path}: {error}. {pending} wait in memory since step {step}.",
        "Training goes on: what could not be written is kept and tried again every few seconds, in order, and the file "
        "is whole up to where it stops. At {limit} the run halts at its last good step. What waits is lost if the "
        "process is killed before.",
        (
            "make room on the disk ({free} are free) or bring it back; nothing else is needed",
            "if that takes longer, stop the run with Ctrl-C once there is room for a checkpoint",
        ),
    ),
    Text(
        "日志在等待磁盘",
        "{path}：{error}。自第 {step} 步起有 {pending} 在内存中等待。",
        "训练继续进行：未能写入的内容保留在内存中，每隔几秒按顺序重试，文件到其停止处为止是完整的。"
        "达到 {limit} 时，运行会停在最后一个正常步。若进程在此之前被终止，等待中的内容会丢失。",
        (
            "在磁盘上腾出空间（可用 {free}）或恢复磁盘；无需其他操作",
            "若需较长时间，请在有空间保存检查点后按 Ctrl-C 停止运行",
        ),
    ),
)

JOURNAL_DAMAGED = Code(
    "SYS041",
    Severity.WARNING,
    Text(
        "the journal is damaged",
        "{path}: {count} damaged places: {places}.",
        "Each line carries a checksum and that of the line before it. A line that agrees with its own is what was "
        "written, before and after a damaged place; what stood in the damaged lines is not known. The states of steps "
        "behind a damaged place cannot be rebuilt from a state before it. Checkpoints carry digests of their own and "
        "stay good.",
        (
            "nothing to do: the run goes on from its newest good checkpoint, and the damaged lines stay as they are",
            "for the state of a step behind a damaged place, start from a checkpoint behind it",
            "check the disk, and what else writes to {path}, if this repeats",
        ),
    ),
    Text(
        "日志已损坏",
        "{path}：{count} 处损坏：{places}。",
        "每一行都带有自身和前一行的校验和。与自身校验和一致的行就是当时写入的内容，无论在损坏处之前还是之后；"
        "损坏的行原来的内容已无从得知。损坏处之后各步的状态无法从其之前的状态重建。检查点有自己的摘要，不受影响。",
        (
            "无需处理：运行从最新的完好检查点继续，损坏的行保持原样",
            "需要损坏处之后某一步的状态时，请从其后的检查点开始",
            "若反复出现，请检查磁盘，以及还有什么在写入 {path}",
        ),
    ),
)

RUN_FOLDER_GONE = Code(
    "SYS042",
    Severity.ERROR,
    Text(
        "the run folder has vanished",
        "{path} was there and is gone ({error}). {pending} of the journal are kept in memory.",
        "It was removed, renamed, or the disk that it is on was unmounted. It is not made anew while that is so: it "
        "could come to stand below the mount point, on the wrong disk.",
        (
            "bring it back (mount the disk, rename it back): the journal goes on where it stopped, and the next "
            "checkpoint is written",
            "if it is lost: make the folder {path} anew, and the run writes a checkpoint and the rest of its journal "
            "there",
        ),
    ),
    Text(
        "运行目录消失了",
        "{path} 原来存在，现在没有了（{error}）。日志中有 {pending} 保留在内存中。",
        "它被删除、改名，或其所在的磁盘被卸载。在此期间不会重新创建：否则可能落在挂载点之下的另一个磁盘上。",
        (
            "恢复它（挂载磁盘，或改回原名）：日志从停下的地方继续，并写入下一个检查点",
            "若已丢失：重新创建目录 {path}，运行会在那里写入检查点和日志的其余部分",
        ),
    ),
)

NO_PARQUET = Code(
    "SYS043",
    Severity.ERROR,
    Text(
        "the journal's table needs a package that is not installed",
        "{path} cannot be written: the package {package} is not installed.",
        "The table of a run's steps is a copy for other tools; the journal itself needs no package.",
        ("pip install 'finitune[parquet]'", "or journal_parquet=false; the journal holds the same"),
    ),
    Text(
        "日志表格需要的软件包没有安装",
        "无法写入 {path}：软件包 {package} 没有安装。",
        "各步的表格是供其他工具使用的副本；日志本身不需要任何软件包。",
        ("pip install 'finitune[parquet]'", "或设置 journal_parquet=false；日志中的内容相同"),
    ),
)

CODES: tuple[Code, ...] = (JOURNAL_WAITS, JOURNAL_DAMAGED, RUN_FOLDER_GONE, NO_PARQUET)
