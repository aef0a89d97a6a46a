"""Codes of the recipe: what is wrong with the file, a key or a value; contradictions are in codes_conflicts.py."""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity
from finitune.train import codes_conflicts, codes_journal, codes_resume, codes_runs

_FIELDS = "`finitune recipes show --fields` lists every key with its type, default and meaning."
_FIELDS_ZH = "`finitune recipes show --fields` 会列出所有键及其类型、默认值和含义。"

RECIPE_NOT_FOUND = Code(
    "CFG001",
    Severity.ERROR,
    Text(
        "recipe not found",
        "There is no recipe {name}{hint}",
        "A recipe is the name of a shipped recipe ({shipped}) or the path of a .yaml, .yml or .json file; "
        "paths are taken from the current folder.",
        ("Check the spelling, or list the shipped recipes with `finitune recipes list`.",),
    ),
    Text(
        "找不到配方",
        "没有配方 {name}{hint}",
        "配方可以是内置配方的名字（{shipped}），也可以是 .yaml、.yml 或 .json 文件的路径；相对路径以当前目录为准。",
        ("检查拼写，或用 `finitune recipes list` 查看内置配方。",),
    ),
)
RECIPE_UNREADABLE = Code(
    "CFG002",
    Severity.ERROR,
    Text(
        "recipe cannot be read",
        "{name} cannot be read as a recipe: {reason}.",
        "A recipe is a text file in UTF-8, in YAML or JSON.",
        ("Give the path of a .yaml, .yml or .json file. A run keeps its own recipe as recipe.yaml in its folder.",),
    ),
    Text(
        "配方无法读取",
        "{name} 不能作为配方读取：{reason}。",
        "配方是 UTF-8 编码的 YAML 或 JSON 文本文件。",
        ("给出一个 .yaml、.yml 或 .json 文件的路径。每次训练都会把自己的配方存为其目录下的 recipe.yaml。",),
    ),
)
BROKEN_SYNTAX = Code(
    "CFG003",
    Severity.ERROR,
    Text(
        "recipe is not valid YAML or JSON",
        "Line {line}, column {column}: {problem}.",
        "The text before that place cannot be continued in this way: {excerpt}",
        (
            "Look at that line and the one before it: indentation, an unclosed quote or bracket, a tab, "
            "a missing space after ':'.",
        ),
    ),
    Text(
        "配方不是有效的 YAML 或 JSON",
        "第 {line} 行第 {column} 列：{problem}。",
        "该处的文本无法继续解析：{excerpt}",
        ("检查这一行和上一行：缩进、未闭合的引号或括号、制表符、“:” 后缺少空格。",),
    ),
)
NOT_A_MAPPING = Code(
    "CFG004",
    Severity.ERROR,
    Text(
        "recipe holds no settings",
        "{name} holds {found} where key: value lines are expected.",
        "A recipe is a mapping of names to values, for example `learning_rate: 2.0e-4`.",
        ("Start from a shipped recipe: `finitune recipes copy quickstart my.yaml`.",),
    ),
    Text(
        "配方中没有设置",
        "{name} 的内容是{found}，而应当是“键: 值”形式的行。",
        "配方是名字到值的映射，例如 `learning_rate: 2.0e-4`。",
        ("可以从内置配方开始：`finitune recipes copy quickstart my.yaml`。",),
    ),
)
UNKNOWN_KEY = Code(
    "CFG005",
    Severity.ERROR,
    Text(
        "unknown key",
        "There is no key {key}{hint}",
        "An unknown key is refused because a misspelt setting would otherwise be ignored in silence.",
        ("Rename or remove it.", _FIELDS),
    ),
    Text(
        "未知的键",
        "没有键 {key}{hint}",
        "未知的键会被拒绝，否则拼错的设置会被悄悄忽略。",
        ("改名或删除它。", _FIELDS_ZH),
    ),
)
WRONG_TYPE = Code(
    "CFG006",
    Severity.ERROR,
    Text(
        "value of the wrong type",
        "{key} is {value}, but must be {expected}{hint}",
        "",
        ("Set {key} to {expected}; the default is {default}.",),
    ),
    Text(
        "值的类型不对",
        "{key} 的值是 {value}，但应为 {expected}{hint}",
        "",
        ("把 {key} 设为 {expected}；默认值是 {default}。",),
    ),
)
OUT_OF_BOUNDS = Code(
    "CFG007",
    Severity.ERROR,
    Text(
        "value out of bounds",
        "{key} is {value}, but must be {expected}.",
        "Outside these bounds a run cannot start, or cannot learn. NaN and infinity are never accepted.",
        ("Choose a value inside the bounds; the default is {default}.",),
    ),
    Text(
        "值超出范围",
        "{key} 的值是 {value}，但应为 {expected}。",
        "超出范围时训练无法开始，或无法学到东西。NaN 和无穷大一律不接受。",
        ("选一个范围内的值；默认值是 {default}。",),
    ),
)
UNKNOWN_CHOICE = Code(
    "CFG008",
    Severity.ERROR,
    Text(
        "not one of the choices",
        "{key} is {value}, which is not one of: {choices}{hint}",
        "",
        ("Choose one of {choices}; the default is {default}.",),
    ),
    Text(
        "不在可选值之中",
        "{key} 的值是 {value}，不在可选值之中：{choices}{hint}",
        "",
        ("从 {choices} 中选择；默认值是 {default}。",),
    ),
)
DUPLICATE_KEY = Code(
    "CFG009",
    Severity.ERROR,
    Text(
        "key given twice",
        "The key {key} stands on line {first} and again on line {line}.",
        "Only one of the two could be used, and it would not be clear which.",
        ("Remove one of the two lines.",),
    ),
    Text(
        "键重复出现",
        "键 {key} 在第 {first} 行和第 {line} 行各出现一次。",
        "两者只能用其一，而用哪一个并不明确。",
        ("删除其中一行。",),
    ),
)
BAD_OVERRIDE = Code(
    "CFG010",
    Severity.ERROR,
    Text(
        "override not understood",
        "The override {override} cannot be used: {reason}.",
        "An override on the command line is key=value with dots between sections; the value is read as YAML.",
        (
            "Write for example `learning_rate=1e-4`, `data.max_length=256`, `data.train=[a.jsonl,b.jsonl]` "
            "or `lora=null`, without dashes and without spaces around '='.",
        ),
    ),
    Text(
        "无法理解的覆盖项",
        "覆盖项 {override} 无法使用：{reason}。",
        "命令行覆盖项的形式是 key=value，各级之间用点分隔；值按 YAML 解析。",
        (
            "例如 `learning_rate=1e-4`、`data.max_length=256`、`data.train=[a.jsonl,b.jsonl]` 或 `lora=null`；"
            "前面不加短横线，等号两边不留空格。",
        ),
    ),
)
CODES = (
    RECIPE_NOT_FOUND,
    RECIPE_UNREADABLE,
    BROKEN_SYNTAX,
    NOT_A_MAPPING,
    UNKNOWN_KEY,
    WRONG_TYPE,
    OUT_OF_BOUNDS,
    UNKNOWN_CHOICE,
    DUPLICATE_KEY,
    BAD_OVERRIDE,
    *codes_conflicts.CODES,
    *codes_journal.CODES,
    *codes_resume.CODES,
    *codes_runs.CODES,
)
