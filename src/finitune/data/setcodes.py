"""Codes for what is odd about a data set as a whole (DAT070..DAT079); the rows concerned are kept."""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity

STOP_NOT_SUPERVISED = Code(
    "DAT070",
    Severity.WARNING,
    Text(
        "The end of the answer is not trained",
        "in {num_rows} of {total} conversations the last supervised token is no end token",
        "The model learns what to say but not when to stop; it will run on until the length limit.",
        ("use a chat template that ends each assistant turn with a special token, inside its generation block",),
    ),
    Text(
        "回答的结尾没有参与训练",
        "{total} 个对话中有 {num_rows} 个的最后一个受监督词元不是结束符",
        "模型学会说什么，却学不会何时停止；它会一直生成到长度上限。",
        ("使用在每个助手轮次末尾（且在 generation 块内）放置特殊结束符的聊天模板",),
    ),
)
MARKER_SPLITS = Code(
    "DAT071",
    Severity.WARNING,
    Text(
        "A control marker of the template is not one token",
        "{marker!r} is written by the chat template but is {num_tokens} tokens in this tokenizer",
        "Template and tokenizer do not belong together; it is learned as ordinary text and nothing stops on it.",
        ("use the tokenizer's own template", "add {marker!r} as a special token and resize the embeddings"),
    ),
    Text(
        "模板的控制标记不是单个词元",
        "聊天模板写出 {marker!r}，但它在此分词器中是 {num_tokens} 个词元",
        "模板与分词器不配套；该标记会被当作普通文本学习，生成时也不会因它停止。",
        ("使用分词器自带的模板", "把 {marker!r} 加为特殊词元并调整嵌入大小"),
    ),
)
TOOLS_IGNORED = Code(
    "DAT072",
    Severity.WARNING,
    Text(
        "Tool descriptions are not shown to the model",
        "{num_rows} rows describe tools, but the chat template has no place for them",
        "The answers call tools that the prompt never mentions.",
        ("use a model whose template knows tools",),
    ),
    Text(
        "工具说明没有展示给模型",
        "{num_rows} 行带有工具说明，但聊天模板没有放置它们的位置",
        "回答会调用提示中从未提到的工具。",
        ("使用模板支持工具的模型",),
    ),
)
NO_END_TOKEN = Code(
    "DAT073",
    Severity.WARNING,
    Text(
        "The tokenizer has no end token",
        "{num_rows} rows end without an end token, because the tokenizer has no eos_token",
        "The model does not learn where a text ends.",
        ("set tokenizer.eos_token",),
    ),
    Text(
        "分词器没有结束符",
        "{num_rows} 行的末尾没有结束符，因为分词器没有 eos_token",
        "模型学不会文本在何处结束。",
        ("设置 tokenizer.eos_token",),
    ),
)
PLACEHOLDERS = Code(
    "DAT074",
    Severity.WARNING,
    Text(
        "Placeholders were never filled in",
        "{num_rows} rows have {{{{...}}}} in the answer, first {example!r}",
        "The model would learn to say the placeholder.",
        ("replace the placeholders in the file before training",),
    ),
    Text(
        "占位符没有填写",
        "{num_rows} 行的回答中含有 {{{{...}}}}，首个为 {example!r}",
        "模型会学会原样说出占位符。",
        ("训练前在文件中替换这些占位符",),
    ),
)
FOREIGN_MARKERS = Code(
    "DAT075",
    Severity.NOTE,
    Text(
        "Prompts carry another chat format",
        "{num_rows} prompts are wrapped in {marker!r} and are wrapped once more by the chat template",
        "Text is never rewritten, so the model sees both wrappings in training and would need both in use.",
        ("strip the markers from the data", "data.template: raw keeps the data's own wrapping alone"),
    ),
    Text(
        "提示自带另一种聊天格式",
        "{num_rows} 个提示已包在 {marker!r} 中，聊天模板会再包一层",
        "文本不会被改写，因此训练时模型会看到两层包装，使用时也就需要两层。",
        ("从数据中去掉这些标记", "data.template: raw 只保留数据自带的包装"),
    ),
)
DUPLICATES = Code(
    "DAT076",
    Severity.NOTE,
    Text(
        "Some rows are exact copies",
        "{num_rows} rows repeat an earlier row",
        "Copies weigh more in training; they are kept, and never split between training and evaluation.",
        ("remove the copies if they are not meant",),
    ),
    Text(
        "有些行完全重复",
        "{num_rows} 行与前面的行重复",
        "重复的行在训练中权重更大；它们会被保留，且不会被分到训练与评估两侧。",
        ("若非有意，请去除重复",),
    ),
)

SET_CODES = (
    *(STOP_NOT_SUPERVISED, MARKER_SPLITS, TOOLS_IGNORED, NO_END_TOKEN, PLACEHOLDERS, FOREIGN_MARKERS, DUPLICATES),
)
