"""Codes of run folders: in use, unreadable."""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity

RUN_IN_USE = Code(
    "SYS030",
    Severity.ERROR,
    Text(
        "the run is in use",
        "{path} is in use by another process (pid {pid}, host {host}).",
        "Two processes that train into one folder would tear each other's journal and checkpoints.",
        (
            "wait for it; `finitune runs {path}` shows how far it is",
            "stop it where it runs with Ctrl-C (or SIGINT): it finishes its step and saves; then go on with "
            "`finitune train --resume {path}`",
            "train into another folder: choose another output_dir, or leave it at auto",
        ),
    ),
    Text(
        "该训练正在使用中",
        "{path} 正被另一个进程使用（进程号 {pid}，主机 {host}）。",
        "两个进程写入同一个目录，会破坏彼此的日志和检查点。",
        (
            "等待它结束；`finitune runs {path}` 可以查看进度",
            "在它运行的地方按 Ctrl-C（或发送 SIGINT）：它会完成当前步并保存；"
            "然后用 `finitune train --resume {path}` 继续",
            "训练到另一个目录：更换 output_dir，或保留 auto",
        ),
    ),
)

NO_RUN_THERE = Code(
    "SYS031",
    Severity.ERROR,
    Text(
        "there is no run",
        "{path}: {reason}.",
        "A run is a folder that holds journal.jsonl or recipe.yaml; a folder of runs holds such folders directly.",
        (
            "name a run or the folder that holds your runs; `finitune runs` alone lists runs/ in the current folder",
            "the folder of a run is output_dir of its recipe; auto is runs/NAME-TIME",
        ),
    ),
    Text(
        "没有找到训练",
        "{path}：{reason}。",
        "训练目录中有 journal.jsonl 或 recipe.yaml；含有多次训练的目录直接包含这样的目录。",
        (
            "指定一个训练目录，或含有训练目录的目录；单独使用 `finitune runs` 会列出当前目录下的 runs/",
            "训练目录就是配方中的 output_dir；auto 表示 runs/NAME-TIME",
        ),
    ),
)
FOLDER_UNREADABLE = Code(
    "SYS032",
    Severity.ERROR,
    Text(
        "a folder cannot be listed",
        "{path} cannot be listed: {error}.",
        "",
        ("check its permissions, and that its disk is mounted",),
    ),
    Text("目录无法列出", "{path} 无法列出：{error}。", "", ("检查目录的权限，以及磁盘是否已挂载",)),
)

CODES: tuple[Code, ...] = (RUN_IN_USE, NO_RUN_THERE, FOLDER_UNREADABLE)
