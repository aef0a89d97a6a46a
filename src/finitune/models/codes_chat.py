"""What can be wrong with a tokenizer or a generation."""

from finitune.core.codes import Code, Text
from finitune.core.types import Severity

NO_TOKENIZER = Code(
    "MOD019",
    Severity.ERROR,
    en=Text(
        "No usable tokenizer",
        "The folder holds no tokenizer that can be read: {reason}.",
        "Text cannot be turned into ids without it, and another model's tokenizer would give wrong ids.",
        ("Put tokenizer.json and tokenizer_config.json (or tokenizer.model) of the same model into the folder.",),
    ),
    zh=Text(
        "没有可用的分词器",
        "该文件夹中没有可读取的分词器：{reason}。",
        "没有它就无法把文本变成编号，而用其他模型的分词器会得到错误的编号。",
        ("把同一模型的 tokenizer.json 与 tokenizer_config.json（或 tokenizer.model）放入该文件夹。",),
    ),
)

NO_SENTENCEPIECE = Code(
    "MOD020",
    Severity.ERROR,
    en=Text(
        "SentencePiece reader not installed",
        "Reading tokenizer.model needs the packages sentencepiece and protobuf: {reason}.",
        "They are optional dependencies.",
        ('pip install "finitune[sentencepiece]"', "Or give a folder with tokenizer.json."),
    ),
    zh=Text(
        "未安装 SentencePiece 读取器",
        "读取 tokenizer.model 需要 sentencepiece 与 protobuf 包：{reason}。",
        "它们是可选依赖。",
        ('pip install "finitune[sentencepiece]"', "或给出含 tokenizer.json 的文件夹。"),
    ),
)

TOKENIZER_DIFFERS = Code(
    "MOD021",
    Severity.ERROR,
    en=Text(
        "The converted tokenizer differs from its source",
        (
            "The fast form of tokenizer.model gives other ids than SentencePiece for {sample!r}: {ours} "
            "instead of {theirs}."
        ),
        ("The model was trained on SentencePiece's ids; a differing tokenizer spoils the training without any error."),
        ("Give a folder with a tokenizer.json made by the authors of the model.",),
    ),
    zh=Text(
        "转换后的分词器与原文件不一致",
        "tokenizer.model 的快速形式对 {sample!r} 给出的编号与 SentencePiece 不同：{ours}，应为 {theirs}。",
        "模型是用 SentencePiece 的编号训练的；分词器不一致会在没有任何报错的情况下毁掉训练。",
        ("给出含有模型作者制作的 tokenizer.json 的文件夹。",),
    ),
)

TOKENIZER_TOO_LARGE = Code(
    "MOD022",
    Severity.WARNING,
    en=Text(
        "The tokenizer has more ids than the model has rows",
        "The tokenizer gives ids up to {max_id}, but the embedding has {num_rows} rows.",
        "An id without a row is an index error on the CPU and garbage elsewhere.",
        ("Take tokenizer and weights from the same revision.",),
    ),
    zh=Text(
        "分词器的编号多于模型的行数",
        "分词器的编号可达 {max_id}，但嵌入只有 {num_rows} 行。",
        "没有对应行的编号在 CPU 上会越界报错，在其他设备上得到无意义的值。",
        ("从同一版本取得分词器与权重。",),
    ),
)

NON_FINITE_LOGITS = Code(
    "MOD033",
    Severity.ERROR,
    en=Text(
        "The model's output is NaN or infinite",
        "The logits are not finite at position {position}, after {num_tokens} new token(s).",
        (
            'Sampling from them would fail with "probability tensor contains either inf, nan or element < '
            '0". Either the weights are poisoned, or a value left the range of the number format.'
        ),
        ("Check the weights of the checkpoint for NaN.", "Generate in bf16 or fp32."),
    ),
    zh=Text(
        "模型输出为 NaN 或无穷",
        "在第 {position} 个位置、生成 {num_tokens} 个新词元之后，logits 不再是有限值。",
        (
            "由其采样会报错 probability tensor contains either inf, nan or element < 0。"
            "权重已被污染，或有值超出了数值格式的范围。"
        ),
        ("检查检查点的权重是否含 NaN。", "改用 bf16 或 fp32 生成。"),
    ),
)

NO_CHAT_TEMPLATE = Code(
    "MOD034",
    Severity.ERROR,
    en=Text(
        "The messages cannot be rendered",
        "The chat template cannot render these messages: {reason}.",
        "A chat needs a template that the tokenizer brings, and roles that the template knows.",
        ("Use a chat model, or train one with a template.", "Give a plain prompt instead of messages."),
    ),
    zh=Text(
        "无法渲染消息",
        "对话模板无法渲染这些消息：{reason}。",
        "对话需要分词器自带的模板，以及模板认识的角色。",
        ("使用对话模型，或带模板训练一个。", "改用普通提示文本。"),
    ),
)

CHATML_GIVEN = Code(
    "MOD035",
    Severity.NOTE,
    en=Text(
        "ChatML template given",
        "The folder has no chat template; the ChatML template of InternLM2 is used.",
        "InternLM2 renders its chats as ChatML with a beginning-of-sequence token in front.",
        ("To use another one, put chat_template into tokenizer_config.json.",),
    ),
    zh=Text(
        "已使用 ChatML 模板",
        "该文件夹没有对话模板，使用 InternLM2 的 ChatML 模板。",
        "InternLM2 的对话为 ChatML 格式，前面带有起始词元。",
        ("若要使用其他模板，请在 tokenizer_config.json 中写入 chat_template。",),
    ),
)

BAD_SAMPLING = Code(
    "MOD037",
    Severity.ERROR,
    en=Text(
        "Sampling setting out of range",
        "{field} = {value} is out of range: it must be {rule}.",
        "Other values have no meaning.",
        ("Typical values: temperature 0 (greedy) to 1, top_p 0.9.",),
    ),
    zh=Text(
        "采样设置超出范围",
        "{field} = {value} 超出范围：应为 {rule}。",
        "其他取值没有意义。",
        ("常用取值：temperature 为 0（贪心）至 1，top_p 为 0.9。",),
    ),
)

TINY_TOKENIZER_GIVEN = Code(
    "MOD038",
    Severity.NOTE,
    en=Text(
        "Byte tokenizer given",
        "The folder has no tokenizer; the built-in byte tokenizer is used with the random weights.",
        "Random weights have no tokenizer of their own to lose.",
        ("Put a tokenizer into the folder to use it.",),
    ),
    zh=Text(
        "已使用字节分词器",
        "该文件夹没有分词器；随机权重搭配使用内置的字节分词器。",
        "随机权重本来就没有专属的分词器。",
        ("若要使用某个分词器，请放入该文件夹。",),
    ),
)

CODES = (
    NO_TOKENIZER,
    NO_SENTENCEPIECE,
    TOKENIZER_DIFFERS,
    TOKENIZER_TOO_LARGE,
    NON_FINITE_LOGITS,
    NO_CHAT_TEMPLATE,
    CHATML_GIVEN,
    BAD_SAMPLING,
    TINY_TOKENIZER_GIVEN,
)
