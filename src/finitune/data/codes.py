"""Codes of the data floor: files and settings (DAT001..DAT029).

What can be wrong with a single row is in ``rowcodes.py``, with a whole data set in ``setcodes.py``;
``CODES`` here holds all three.
"""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity
from finitune.data.rowcodes import ROW_CODES
from finitune.data.setcodes import SET_CODES

MISSING_FILE = Code(
    "DAT001",
    Severity.ERROR,
    Text(
        "Data file not found",
        "no data file at {path!r}.{hint}",
        "The path is read relative to the folder the command runs in; a pattern (*.jsonl) must match at least one.",
        ("correct the path in the recipe (data.train / data.eval), or run from the project's folder",),
    ),
    Text(
        "找不到数据文件",
        "{path!r} 处没有数据文件。{hint}",
        "路径相对于运行命令时所在的文件夹；通配符（*.jsonl）至少要匹配一个文件。",
        ("修正配方中的路径（data.train / data.eval），或在项目文件夹下运行",),
    ),
)
IS_DIRECTORY = Code(
    "DAT002",
    Severity.ERROR,
    Text(
        "A folder was given instead of a data file",
        "{path!r} is a folder with {num_files} data file(s): {files}",
        "Which files of a folder are training data is for you to say; taking all of them could mix in the test set.",
        ("name a file, or a pattern such as {path}/*.jsonl",),
    ),
    Text(
        "给出的是文件夹而不是数据文件",
        "{path!r} 是文件夹，其中有 {num_files} 个数据文件：{files}",
        "文件夹里哪些文件是训练数据应由你指明；全部读取可能会混入测试集。",
        ("指明一个文件，或使用通配符，如 {path}/*.jsonl",),
    ),
)
EMPTY_FILE = Code(
    "DAT003",
    Severity.ERROR,
    Text(
        "Data file is empty",
        "{path!r} holds no row ({size_bytes} bytes)",
        "An interrupted download or export leaves such files.",
        ("write or download the file again", "remove it from the list of data files"),
    ),
    Text(
        "数据文件为空",
        "{path!r} 中没有任何数据行（{size_bytes} 字节）",
        "下载或导出中断会留下这样的文件。",
        ("重新生成或下载该文件", "把它从数据文件列表中去掉"),
    ),
)
BINARY_FILE = Code(
    "DAT004",
    Severity.ERROR,
    Text(
        "Data file is not text",
        "{path!r} is {kind}, not UTF-8 text",
        "JSON and text files are read as UTF-8; a compressed, binary or UTF-16 file must be converted first.",
        ("{cure}",),
    ),
    Text(
        "数据文件不是文本",
        "{path!r} 是 {kind}，不是 UTF-8 文本",
        "JSON 和文本文件按 UTF-8 读取；压缩、二进制或 UTF-16 文件须先转换。",
        ("{cure}",),
    ),
)
BROKEN_JSON_FILE = Code(
    "DAT005",
    Severity.ERROR,
    Text(
        "JSON file cannot be parsed",
        "{path!r} breaks at line {line}, column {column}: {reason}",
        "A .json file is one value; after a fault in it no later row can be trusted.",
        ("repair the file at that place", "store one object per line as .jsonl: then one bad line costs one row"),
    ),
    Text(
        "JSON 文件无法解析",
        "{path!r} 在第 {line} 行第 {column} 列出错：{reason}",
        ".json 文件是一个整体；出错之后的行都不可信。",
        ("修复该处", "改存为每行一个对象的 .jsonl：那样一行出错只损失一行"),
    ),
)
UNKNOWN_COLUMNS = Code(
    "DAT006",
    Severity.ERROR,
    Text(
        "No format fits the columns",
        "{path!r} has the columns {columns}; no data format knows them",
        "A format is recognised by its column names. What each needs: {needs}",
        ("rename the columns to those of one format", "name the format (data.format) if it was not recognised"),
    ),
    Text(
        "没有格式与列名相符",
        "{path!r} 的列为 {columns}；没有数据格式能识别",
        "格式是按列名识别的。各格式需要：{needs}",
        ("把列名改为某一格式的列名", "若未被识别，请直接指定格式（data.format）"),
    ),
)
UNKNOWN_TYPE = Code(
    "DAT007",
    Severity.ERROR,
    Text(
        "Unknown kind of data file",
        "{path!r} ends in {suffix!r}; readable are {known}",
        "The ending says how a file is cut into rows.",
        ("convert the file to .jsonl (one JSON object per line)",),
    ),
    Text(
        "未知的数据文件类型",
        "{path!r} 的后缀为 {suffix!r}；可读取的有 {known}",
        "后缀决定文件如何切分成行。",
        ("把文件转换为 .jsonl（每行一个 JSON 对象）",),
    ),
)
NO_PYARROW = Code(
    "DAT008",
    Severity.ERROR,
    Text(
        "Parquet needs pyarrow",
        "{path!r} is a parquet file and pyarrow is not installed",
        "pyarrow is an optional dependency.",
        ("pip install 'finitune[parquet]'", "convert the file to .jsonl"),
    ),
    Text(
        "读取 parquet 需要 pyarrow",
        "{path!r} 是 parquet 文件，而 pyarrow 未安装",
        "pyarrow 是可选依赖。",
        ("pip install 'finitune[parquet]'", "把文件转换为 .jsonl"),
    ),
)
UNREADABLE = Code(
    "DAT009",
    Severity.ERROR,
    Text(
        "Data file cannot be read",
        "{path!r}: {reason}",
        "The file is there, but the system or its reader refuses it.",
        ("check the permissions", "write or download the file again"),
    ),
    Text(
        "数据文件无法读取",
        "{path!r}：{reason}",
        "文件存在，但系统或读取程序拒绝读取。",
        ("检查权限", "重新生成或下载该文件"),
    ),
)
NO_CHAT_TEMPLATE = Code(
    "DAT010",
    Severity.ERROR,
    Text(
        "The tokenizer has no chat template",
        "the data is conversations (format {format}), but the tokenizer has no chat template",
        "Without a template it is not defined how turns become text, nor which tokens are the assistant's.",
        (
            "use the instruct/chat version of the model, or set tokenizer.chat_template",
            "data.template: raw trains on prompt + answer + end token (single-turn data only)",
        ),
    ),
    Text(
        "分词器没有聊天模板",
        "数据是对话（格式 {format}），但分词器没有聊天模板",
        "没有模板就无法确定各轮如何变成文本，也无法确定哪些词元属于助手。",
        (
            "使用该模型的 instruct/chat 版本，或设置 tokenizer.chat_template",
            "data.template: raw 按 提示 + 回答 + 结束符 训练（仅限单轮数据）",
        ),
    ),
)
MAX_LENGTH_TOO_SMALL = Code(
    "DAT011",
    Severity.ERROR,
    Text(
        "max_length is smaller than the template",
        "max_length is {max_length}, but the chat template alone takes {overhead} tokens; with one token of prompt and "
        "one of answer a row needs {needed}",
        "No row could hold a supervised token; training would report a loss of 0 or NaN and learn nothing.",
        ("raise max_length to {needed} or more (512 to 4096 is usual)",),
    ),
    Text(
        "max_length 小于模板本身",
        "max_length 为 {max_length}，而聊天模板本身就占 {overhead} 个词元；再加一个提示词元和一个回答词元，"
        "每行至少需要 {needed} 个",
        "这样没有一行含有受监督的词元；训练会报告损失 0 或 NaN，什么也学不到。",
        ("把 max_length 提高到 {needed} 以上（通常为 512 到 4096）",),
    ),
)
ALL_ROWS_BAD = Code(
    "DAT012",
    Severity.ERROR,
    Text(
        "No usable row",
        "none of {num_rows} rows can be used: {counts}",
        "First one: {first}",
        ("mend what the first row shows: the others usually share its fault", "finitune explain CODE tells more"),
    ),
    Text(
        "没有可用的行",
        "{num_rows} 行中没有一行可用：{counts}",
        "第一行的问题：{first}",
        ("按第一行的提示修复：其余各行通常是同样的问题", "finitune explain CODE 有更多说明"),
    ),
)
STOPPED = Code(
    "DAT013",
    Severity.ERROR,
    Text(
        "Bad rows, and on_bad_row is stop",
        "{num_bad} of {num_rows} rows are bad ({counts}); the first {num_shown} follow",
        "on_bad_row: stop asks to refuse a data set with any bad row.",
        ("mend or remove these rows", "on_bad_row: skip trains without them and counts them in the summary"),
    ),
    Text(
        "存在坏行，而 on_bad_row 为 stop",
        "{num_rows} 行中有 {num_bad} 行有问题（{counts}）；以下为前 {num_shown} 个",
        "on_bad_row: stop 要求只要有坏行就拒绝整个数据集。",
        ("修复或删除这些行", "on_bad_row: skip 会跳过它们训练，并在摘要中计数"),
    ),
)
SLOW_TOKENIZER = Code(
    "DAT014",
    Severity.ERROR,
    Text(
        "The tokenizer gives no character offsets",
        "{tokenizer} is a slow tokenizer",
        "Which tokens are the assistant's is found by character offsets, so that it is exact; only fast tokenizers "
        "(tokenizer.json) give them.",
        ("convert it: AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(folder)",),
    ),
    Text(
        "分词器不提供字符偏移",
        "{tokenizer} 是慢速分词器",
        "哪些词元属于助手由字符偏移精确确定；只有快速分词器（tokenizer.json）提供偏移。",
        ("转换它：AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(folder)",),
    ),
)
UNKNOWN_FORMAT = Code(
    "DAT015",
    Severity.ERROR,
    Text(
        "Unknown data format",
        "there is no data format {format!r}; known are auto, {known}.{hint}",
        "A format says which columns make a conversation.",
        ("use format: auto, or one of the known names",),
    ),
    Text(
        "未知的数据格式",
        "没有名为 {format!r} 的数据格式；已知的有 auto、{known}。{hint}",
        "格式说明由哪些列组成对话。",
        ("使用 format: auto，或已知名称之一",),
    ),
)
NO_ROW_LIST = Code(
    "DAT016",
    Severity.ERROR,
    Text(
        "JSON file holds no list of rows",
        "{path!r} is {found}; expected a list of rows, or an object with one list of rows (under {keys})",
        "Rows can only be taken from a list.",
        ("store the rows as a list, or one object per line as .jsonl",),
    ),
    Text(
        "JSON 文件中没有行列表",
        "{path!r} 是 {found}；应为行的列表，或含有一个行列表的对象（键为 {keys}）",
        "行只能取自列表。",
        ("把各行存为列表，或存为每行一个对象的 .jsonl",),
    ),
)
BAD_SETTING = Code(
    "DAT017",
    Severity.ERROR,
    Text(
        "A data setting has an impossible value",
        "{name} is {value!r}; it must be {expected}",
        "",
        ("set {name} to {expected}",),
    ),
    Text("数据设置的值不可用", "{name} 为 {value!r}；应为 {expected}", "", ("把 {name} 设为 {expected}",)),
)
SPLIT_TOO_LARGE = Code(
    "DAT018",
    Severity.ERROR,
    Text(
        "Nothing would be left to train on",
        "the evaluation part asks for {wanted} of {num_rows} rows",
        "Rows with the same content stay on one side, so that nothing learned is also examined; each side needs a row.",
        ("ask for fewer evaluation rows", "add data, or turn evaluation off"),
    ),
    Text(
        "没有剩下可训练的数据",
        "评估部分要求 {num_rows} 行中的 {wanted} 行",
        "内容相同的行留在同一侧，以免考到学过的；两侧都至少要有一行。",
        ("减少评估行数", "增加数据，或关闭评估"),
    ),
)
NO_STEP = Code(
    "DAT019",
    Severity.ERROR,
    Text(
        "An epoch has no step",
        "{num_rows} rows make no full step of {batch_size} x {accumulation} rows, and drop_last drops the rest",
        "With drop_last an incomplete step is left out; here that is all of them.",
        ("set drop_last to false", "lower per_device_train_batch_size or gradient_accumulation_steps"),
    ),
    Text(
        "一个轮次中没有任何步",
        "{num_rows} 行凑不成 {batch_size} x {accumulation} 行的完整一步，而 drop_last 会丢弃余下部分",
        "启用 drop_last 时不完整的步会被丢弃；这里全部被丢弃了。",
        ("把 drop_last 设为 false", "减小 per_device_train_batch_size 或 gradient_accumulation_steps"),
    ),
)
CODES = (
    *(MISSING_FILE, IS_DIRECTORY, EMPTY_FILE, BINARY_FILE, BROKEN_JSON_FILE, UNKNOWN_COLUMNS, UNKNOWN_TYPE),
    *(NO_PYARROW, UNREADABLE, NO_CHAT_TEMPLATE, MAX_LENGTH_TOO_SMALL, ALL_ROWS_BAD, STOPPED, SLOW_TOKENIZER),
    *(UNKNOWN_FORMAT, NO_ROW_LIST, BAD_SETTING, SPLIT_TOO_LARGE, NO_STEP),
    *SET_CODES,
    *ROW_CODES,
)
