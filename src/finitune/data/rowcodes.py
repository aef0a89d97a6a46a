"""Codes for single rows: a fault that costs the row (DAT030..DAT059), or a change that is noted (DAT060..DAT069)."""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity

_MEND_EN = "mend or remove the row; on_bad_row: skip trains without it"
_MEND_ZH = "修复或删除该行；on_bad_row: skip 会跳过它训练"


def _bad(code: str, en: tuple[str, str, str], zh: tuple[str, str, str], *cures: tuple[str, str]) -> Code:
    """A code that costs the row; each cure is (English, Chinese)."""
    english = (*(c[0] for c in cures), _MEND_EN)
    chinese = (*(c[1] for c in cures), _MEND_ZH)
    return Code(code, Severity.ERROR, Text(*en, english), Text(*zh, chinese))


def _note(code: str, en: tuple[str, str, str], zh: tuple[str, str, str], cure: tuple[str, str]) -> Code:
    return Code(code, Severity.NOTE, Text(*en, (cure[0],)), Text(*zh, (cure[1],)))


BROKEN_JSON_LINE = _bad(
    "DAT030",
    ("Line is not JSON", "line {row}, column {column}: {reason}", "The line cannot be read; the lines after it can."),
    ("该行不是 JSON", "第 {row} 行第 {column} 列：{reason}", "该行无法读取；其后的行不受影响。"),
)
INVALID_UTF8 = _bad(
    "DAT031",
    (
        "Line is not UTF-8",
        "line {row} has the byte {byte} at column {column} (bytes), which is not UTF-8",
        "A file in another encoding (GBK, Latin-1) or cut in the middle of a character would be read as wrong letters.",
    ),
    (
        "该行不是 UTF-8",
        "第 {row} 行第 {column} 字节处为 {byte}，不是 UTF-8",
        "其他编码（GBK、Latin-1）或在字符中间截断的文件会被读成错误的文字。",
    ),
    ("convert the file: iconv -f GBK -t UTF-8", "转换文件编码：iconv -f GBK -t UTF-8"),
)
NOT_AN_OBJECT = _bad(
    "DAT032",
    ("Row is not an object", "row {row} is {found}, not an object with named fields", "Fields are found by name."),
    ("行不是对象", "第 {row} 行是 {found}，不是带字段名的对象", "字段是按名称查找的。"),
)
MISSING_FIELD = _bad(
    "DAT033",
    ("Field is missing", "row {row} has no {field!r}; it has {columns}", "The format {format} needs this field."),
    ("缺少字段", "第 {row} 行没有 {field!r}；它有 {columns}", "格式 {format} 需要该字段。"),
)
WRONG_TYPE = _bad(
    "DAT034",
    ("Field has the wrong type", "row {row}: {field!r} is {found}, expected {expected}", "It cannot be read as text."),
    ("字段类型错误", "第 {row} 行：{field!r} 是 {found}，应为 {expected}", "它无法作为文本读取。"),
)
EMPTY_ANSWER = _bad(
    "DAT035",
    ("Answer is empty", "row {row}: {field!r} is empty", "An empty answer would train the model to stop at once."),
    ("回答为空", "第 {row} 行：{field!r} 为空", "空回答会训练模型立即停止。"),
)
EMPTY_PROMPT = _bad(
    "DAT036",
    ("Prompt or text is empty", "row {row}: {field!r} is empty", "There is nothing to learn the answer from."),
    ("提示或文本为空", "第 {row} 行：{field!r} 为空", "没有可供学习的内容。"),
)
UNKNOWN_ROLE = _bad(
    "DAT037",
    (
        "Unknown role",
        "row {row}: {field!r} is {role!r}; known are {known}",
        "A turn of an unknown speaker can be neither shown nor trained.",
    ),
    ("未知角色", "第 {row} 行：{field!r} 是 {role!r}；已知角色有 {known}", "说话者未知的轮次既不能展示也不能训练。"),
    ("rename the role to user, assistant, system or tool", "把角色改名为 user、assistant、system 或 tool"),
)
NO_ANSWER = _bad(
    "DAT038",
    ("No turn to train on", "row {row}: {field!r} has no supervised assistant turn", "Loss falls on assistant turns."),
    ("没有可训练的轮次", "第 {row} 行：{field!r} 中没有受监督的助手轮次", "损失只计算在助手轮次上。"),
)
MEDIA = _bad(
    "DAT039",
    (
        "Row needs images or sound",
        "row {row}: {field!r} holds {kind}",
        "Only text is trained; without it half is lost.",
    ),
    ("该行需要图像或声音", "第 {row} 行：{field!r} 含有 {kind}", "只训练文本；去掉它内容就不完整。"),
)
TEMPLATE_REFUSED = _bad(
    "DAT040",
    (
        "Chat template refuses the conversation",
        "row {row} (roles {roles}): {reason}",
        "Templates may demand alternating turns or know no system or tool role.",
    ),
    (
        "聊天模板拒绝该对话",
        "第 {row} 行（角色 {roles}）：{reason}",
        "模板可能要求轮次交替，或不支持 system、tool 角色。",
    ),
    ("use the roles that the model's template knows", "使用该模型模板支持的角色"),
)
TEMPLATE_DROPS = _bad(
    "DAT041",
    (
        "Chat template leaves a turn out",
        "row {row}: turn {turn} ({role}) does not appear in the rendered text",
        "The answer would be trained without what it answers.",
    ),
    ("聊天模板漏掉了一轮", "第 {row} 行：第 {turn} 轮（{role}）没有出现在渲染结果中", "回答会在缺少依据的情况下训练。"),
    ("use a model whose template knows the role", "使用模板支持该角色的模型"),
)
NO_SUPERVISED = _bad(
    "DAT042",
    (
        "No supervised token",
        "row {row}: none of its {num_tokens} tokens is a training target",
        "Such a row adds nothing, and a step made of such rows has a loss of 0 or NaN.",
    ),
    (
        "没有受监督的词元",
        "第 {row} 行：{num_tokens} 个词元中没有训练目标",
        "这样的行毫无作用，全由它组成的一步损失为 0 或 NaN。",
    ),
)
ROW_TOO_LONG = _bad(
    "DAT043",
    ("Row is too long", "row {row} has {num_tokens} tokens, max_length is {max_length}", "truncation is drop_row."),
    ("行过长", "第 {row} 行有 {num_tokens} 个词元，max_length 为 {max_length}", "truncation 为 drop_row。"),
    ("raise max_length, or set truncation: truncate_prompt", "提高 max_length，或设置 truncation: truncate_prompt"),
)
ANSWER_TOO_LONG = _bad(
    "DAT044",
    (
        "Answer does not fit",
        "row {row} has {num_supervised} answer tokens; with template, system turn and {floor} prompt tokens it needs "
        "{needed}, max_length is {max_length}",
        "An answer is never cut silently: the model would learn to break off.",
    ),
    (
        "回答放不下",
        "第 {row} 行有 {num_supervised} 个回答词元；加上模板、系统轮次和 {floor} 个提示词元需要 {needed} 个，"
        "max_length 为 {max_length}",
        "回答绝不会被悄悄截断：那样模型会学会中途停下。",
    ),
    ("raise max_length to {needed}", "把 max_length 提高到 {needed}"),
    ("truncation: truncate_answer cuts answers, counted", "truncation: truncate_answer 会截断回答并计数"),
)
ID_BEYOND_EMBEDDING = _bad(
    "DAT045",
    (
        "Token id beyond the embedding",
        "row {row}: token {token!r} has id {token_id}, the model's embedding has {vocab_rows} rows",
        "Tokenizer and model do not fit; looking such an id up crashes or reads foreign memory on some devices.",
    ),
    (
        "词元 id 超出嵌入范围",
        "第 {row} 行：词元 {token!r} 的 id 为 {token_id}，而模型嵌入只有 {vocab_rows} 行",
        "分词器与模型不匹配；查找这样的 id 会崩溃，或在某些设备上读到无关内存。",
    ),
    ("use the model's own tokenizer, or resize the embedding", "使用模型自带的分词器，或调整嵌入大小"),
)
MASK_UNCERTAIN = _bad(
    "DAT046",
    (
        "The answer cannot be found in the rendered text",
        "row {row}: the chat template rewrites turn {turn}, or its generation block holds something else, so which "
        "tokens are the answer is not certain",
        "A wrong mask trains on the prompt or skips the answer without any sign.",
    ),
    (
        "无法在渲染结果中定位回答",
        "第 {row} 行：聊天模板改写了第 {turn} 轮，或其 generation 块标记的是别的内容，因而无法确定哪些词元是回答",
        "错误的掩码会悄悄训练提示或漏掉回答。",
    ),
    (
        "use a template that prints the turns unchanged, with the answers inside its generation blocks",
        "使用原样输出各轮、且回答位于 generation 块内的模板",
    ),
)
BAD_TEXT = _bad(
    "DAT047",
    (
        "Text holds half a character",
        "row {row}: {field!r} has the lone surrogate U+{codepoint} at character {column}",
        "It is no Unicode text (an emoji cut in two, usually) and cannot be tokenised.",
    ),
    (
        "文本含有半个字符",
        "第 {row} 行：{field!r} 的第 {column} 个字符是孤立代理项 U+{codepoint}",
        "它不是合法的 Unicode 文本（通常是被截断的表情符号），无法分词。",
    ),
)
RAW_NEEDS_ONE_TURN = _bad(
    "DAT048",
    (
        "Conversation cannot be trained raw",
        "row {row} has the turns {roles}; template: raw takes one prompt and one answer",
        "Without a template there is no agreed way to join more turns.",
    ),
    (
        "对话无法以 raw 方式训练",
        "第 {row} 行的轮次为 {roles}；template: raw 只接受一问一答",
        "没有模板就没有约定的方式连接更多轮次。",
    ),
    ("use template: auto with a chat tokenizer", "对带聊天模板的分词器使用 template: auto"),
)
PROMPT_TRUNCATED = _note(
    "DAT060",
    (
        "Prompt was shortened",
        "row {row}: {num_removed} of {num_tokens} tokens were cut from the start of the prompt",
        "The row was longer than max_length ({max_length}); the answer, the system turn and the template are whole.",
    ),
    (
        "提示被缩短",
        "第 {row} 行：从提示开头截去了 {num_tokens} 个词元中的 {num_removed} 个",
        "该行超过 max_length（{max_length}）；回答、系统轮次和模板保持完整。",
    ),
    ("raise max_length to keep the whole prompt", "提高 max_length 以保留完整提示"),
)
TURNS_DROPPED = _note(
    "DAT061",
    (
        "Oldest turns were left out",
        "row {row}: {num_dropped} oldest turns left out, {num_answers} of them answers",
        "The conversation was longer than max_length ({max_length}).",
    ),
    (
        "最早的轮次被去掉",
        "第 {row} 行：去掉了最早的 {num_dropped} 轮，其中 {num_answers} 轮是回答",
        "对话超过 max_length（{max_length}）。",
    ),
    ("raise max_length to keep the whole conversation", "提高 max_length 以保留完整对话"),
)
ANSWER_TRUNCATED = _note(
    "DAT062",
    (
        "Answer was cut",
        "row {row}: {num_removed} of {num_tokens} tokens were cut from the end of the answer",
        "truncation is truncate_answer; the cut answer has no end token, so that breaking off is not learned.",
    ),
    (
        "回答被截断",
        "第 {row} 行：从回答末尾截去了 {num_tokens} 个词元中的 {num_removed} 个",
        "truncation 为 truncate_answer；截断的回答没有结束符，以免模型学会中途停下。",
    ),
    ("raise max_length to keep whole answers", "提高 max_length 以保留完整回答"),
)
TURN_REWRITTEN = _note(
    "DAT063",
    (
        "An earlier answer is shown but not trained",
        "row {row}: the chat template rewrites the turns {turns}; they are context only",
        "Templates of reasoning models strip the thinking of earlier answers; the rest is not what the model should "
        "say first.",
    ),
    (
        "较早的回答只展示、不训练",
        "第 {row} 行：聊天模板改写了第 {turns} 轮；它们只作为上下文",
        "推理模型的模板会去掉较早回答中的思考；剩下的部分不是模型应首先说的话。",
    ),
    ("split the conversation: one row per answer trains them all", "拆分对话：每个回答一行即可全部训练"),
)
ANSWER_REWRITTEN = Code(
    "DAT065",
    Severity.WARNING,
    Text(
        "The chat template changes the answer",
        "row {row}: the answer of turn {turn} is trained in the words of the template: {shown!r} instead of {meant!r}",
        "The model learns to write what the template makes of the answers (escaped, in capitals, with other letters), "
        "and at inference nobody changes it back.",
        ("use a template that prints the answers unchanged", _MEND_EN),
    ),
    Text(
        "聊天模板改动了回答",
        "第 {row} 行：第 {turn} 轮的回答按模板改写后的文字训练：{shown!r}，而不是 {meant!r}",
        "模型会学着写出模板改写后的样子（转义、大写、换字符），而推理时没有人把它改回来。",
        ("使用原样输出回答的模板", _MEND_ZH),
    ),
)
CONTROL_TEXT = _note(
    "DAT064",
    (
        "Text holds a control token",
        "row {row}: {field!r} contains {marker!r}, which the tokenizer reads as a control token",
        "Inside a text it may end a turn early or open a false one.",
    ),
    (
        "文本含有控制词元",
        "第 {row} 行：{field!r} 含有 {marker!r}，分词器会把它读作控制词元",
        "它在文本中可能提前结束一轮，或开启虚假的一轮。",
    ),
    ("remove it from the text unless it is meant", "若非有意，请从文本中去掉"),
)

ROW_CODES = (
    *(BROKEN_JSON_LINE, INVALID_UTF8, NOT_AN_OBJECT, MISSING_FIELD, WRONG_TYPE, EMPTY_ANSWER, EMPTY_PROMPT),
    *(UNKNOWN_ROLE, NO_ANSWER, MEDIA, TEMPLATE_REFUSED, TEMPLATE_DROPS, NO_SUPERVISED, ROW_TOO_LONG),
    *(ANSWER_TOO_LONG, ID_BEYOND_EMBEDDING, MASK_UNCERTAIN, BAD_TEXT, RAW_NEEDS_ONE_TURN),
    *(PROMPT_TRUNCATED, TURNS_DROPPED, ANSWER_TRUNCATED, TURN_REWRITTEN, ANSWER_REWRITTEN),
    CONTROL_TEXT,
)
