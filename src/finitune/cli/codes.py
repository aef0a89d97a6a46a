"""Codes of the command line."""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity

BAD_USAGE = Code(
    "CFG060",
    Severity.ERROR,
    Text(
        "command not understood",
        "{problem}",
        "",
        ("`{command} --help` shows what can be written.",),
    ),
    Text("无法理解的命令", "{problem}", "", ("用 `{command} --help` 查看用法。",)),
)
TWO_RECIPES = Code(
    "CFG061",
    Severity.ERROR,
    Text(
        "more than one recipe",
        "{first} and {second} are both given as the recipe.",
        "One recipe is trained at a time; a setting is written key=value, without spaces.",
        ("Name one recipe, and write settings as key=value, for example `learning_rate=1e-4`.",),
    ),
    Text(
        "给出了多个配方",
        "{first} 和 {second} 都被当作配方。",
        "一次只训练一个配方；设置写成 key=value，中间不留空格。",
        ("只写一个配方，设置写成 key=value，例如 `learning_rate=1e-4`。",),
    ),
)
UNKNOWN_CODE = Code(
    "CFG062",
    Severity.ERROR,
    Text(
        "unknown code",
        "There is no code {name}{hint}",
        "",
        ("`finitune explain` lists all codes.",),
    ),
    Text("未知的代码", "没有代码 {name}{hint}", "", ("用 `finitune explain` 列出所有代码。",)),
)
COPY_EXISTS = Code(
    "CFG063",
    Severity.ERROR,
    Text(
        "copy would overwrite a file",
        "{path} exists already.",
        "",
        ("Give another name: `finitune recipes copy {name} OTHER.yaml`.", "Or overwrite it with --force."),
    ),
    Text(
        "复制会覆盖已有文件",
        "{path} 已经存在。",
        "",
        ("换一个名字：`finitune recipes copy {name} OTHER.yaml`。", "或用 --force 覆盖。"),
    ),
)
CANNOT_WRITE = Code(
    "CFG064",
    Severity.ERROR,
    Text(
        "cannot write there",
        "{path} cannot be written: {problem}.",
        "",
        ("Choose a place that exists and may be written to.",),
    ),
    Text("无法写入", "{path} 无法写入：{problem}。", "", ("选择一个存在且可写的位置。",)),
)
NO_MODEL_IN_RUN = Code(
    "CFG065",
    Severity.ERROR,
    Text(
        "run without a model",
        "The run {path} holds neither a final model nor a checkpoint.",
        "A run writes checkpoint-N every save_steps, and final at its end.",
        ("Resume it with `finitune train --resume {path}`, or name another run.",),
    ),
    Text(
        "训练目录中没有模型",
        "训练 {path} 中既没有最终模型，也没有检查点。",
        "训练每隔 save_steps 写一个 checkpoint-N，结束时写 final。",
        ("用 `finitune train --resume {path}` 继续训练，或指定另一个训练目录。",),
    ),
)
OUTPUT_HOLDS_FILES = Code(
    "CFG066",
    Severity.ERROR,
    Text(
        "output folder is not empty",
        "{path} holds {count} item(s) already.",
        "Mixing two models in one folder makes both unusable.",
        ("Name a new folder.", "Or replace what is there with --overwrite."),
    ),
    Text(
        "输出目录不是空的",
        "{path} 中已有 {count} 项内容。",
        "把两个模型混在一个目录里，两者都会不可用。",
        ("指定一个新目录。", "或用 --overwrite 替换其中的内容。"),
    ),
)
OUTPUT_UNSUITABLE = Code(
    "CFG067",
    Severity.ERROR,
    Text(
        "output folder cannot be used",
        "{path} cannot be the output: {problem}.",
        "",
        ("Name a new folder.",),
    ),
    Text("输出目录不可用", "{path} 不能作为输出：{problem}。", "", ("指定一个新目录。",)),
)

CODES = (
    BAD_USAGE,
    TWO_RECIPES,
    UNKNOWN_CODE,
    COPY_EXISTS,
    CANNOT_WRITE,
    NO_MODEL_IN_RUN,
    OUTPUT_HOLDS_FILES,
    OUTPUT_UNSUITABLE,
)
