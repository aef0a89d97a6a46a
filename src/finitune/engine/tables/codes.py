"""Codes of tables that are looked up by number."""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity

BEYOND_TABLE = Code(
    "DAT115",
    Severity.ERROR,
    Text(
        "a number of the batch is beyond the table that it is looked up in",
        "{name}[{index}] is {value}; {table} has {num_rows} rows (0 to {last}). {count} such numbers, in rows "
        "{row_numbers} of micro-batch {micro_number}.",
        "The lookup fails, on a GPU with an assertion that names no row. Usually tokens were added to the tokenizer "
        "and the model was not resized, or the -100 of the labels stands among the ids. No weight was touched.",
        (
            "model.resize_token_embeddings(len(tokenizer)), and give the new rows the mean of the old ones",
            "take the tokenizer of this very model; pad ids with pad_token_id, never with -100",
            "longer rows than there are positions: cut them, or raise max_position_embeddings",
        ),
    ),
    Text(
        "批次中的某个编号超出了所查的表",
        "{name}[{index}] 为 {value}；{table} 有 {num_rows} 行（0 到 {last}）。这样的编号共 {count} 个，"
        "位于第 {micro_number} 个微批次的第 {row_numbers} 行。",
        "查表失败，在 GPU 上只有一条不指明数据行的断言。通常是分词器添加了词元而模型没有扩表，"
        "或标签的 -100 混进了 id。权重未受影响。",
        (
            "model.resize_token_embeddings(len(tokenizer))，并让新行取旧行的平均值",
            "使用该模型自带的分词器；id 用 pad_token_id 填充，绝不用 -100",
            "行长超过位置数时：截断，或增大 max_position_embeddings",
        ),
    ),
)
CODES = (BEYOND_TABLE,)
