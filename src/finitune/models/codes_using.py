"""MOD019 to MOD038: what can be wrong with tokenizers, adapters, freezing, saving and generation."""

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

QUANTISED = Code(
    "MOD023",
    Severity.ERROR,
    en=Text(
        "Quantised checkpoint",
        "The checkpoint is quantised ({method}); its weights cannot be trained as they are.",
        "Quantised weights have no gradient.",
        ("Use the original checkpoint in bf16, fp16 or fp32.",),
    ),
    zh=Text(
        "检查点已量化",
        "该检查点已量化（{method}），其权重无法直接训练。",
        "量化后的权重没有梯度。",
        ("使用原始的 bf16、fp16 或 fp32 检查点。",),
    ),
)

ADAPTER_FOLDER = Code(
    "MOD024",
    Severity.ERROR,
    en=Text(
        "This is an adapter, not a model",
        "The folder holds a PEFT adapter of the base model {base!r}, not a whole model.",
        "A base model is needed here.",
        (
            "Give the base model: {base}.",
            "To chat with or merge the adapter, give this folder to `finitune chat` or `finitune export`.",
        ),
    ),
    zh=Text(
        "这是适配器，不是模型",
        "该文件夹是基座模型 {base!r} 的 PEFT 适配器，不是完整模型。",
        "此处需要基座模型。",
        ("给出基座模型：{base}。", "若要与适配器对话或合并，请把该文件夹交给 `finitune chat` 或 `finitune export`。"),
    ),
)

BAD_ADAPTER = Code(
    "MOD025",
    Severity.ERROR,
    en=Text(
        "The adapter does not fit",
        "The adapter cannot be put on its base model: {reason}.",
        "It was made for another base model, or it is cut short.",
        ("Check base_model_name_or_path in adapter_config.json.", "Copy the adapter folder again."),
    ),
    zh=Text(
        "适配器不匹配",
        "无法把适配器装到其基座模型上：{reason}。",
        "它是为其他基座模型制作的，或文件不完整。",
        ("检查 adapter_config.json 中的 base_model_name_or_path。", "重新复制适配器文件夹。"),
    ),
)

TARGET_NOT_FOUND = Code(
    "MOD026",
    Severity.ERROR,
    en=Text(
        "LoRA target matches nothing",
        "No {kind} module is called {target!r} (did you mean: {close}).",
        (
            "A target that matches nothing would be ignored, and less would be trained than asked for. "
            "Modules that exist: {existing}."
        ),
        ('Use one of the existing names, "auto" or "all-linear".',),
    ),
    zh=Text(
        "LoRA 目标没有匹配",
        "没有名为 {target!r} 的{kind}模块（是否想写：{close}）。",
        "没有匹配的目标会被忽略，训练的内容就比要求的少。现有模块：{existing}。",
        ('使用现有名称之一，或 "auto"、"all-linear"。',),
    ),
)

BAD_LORA = Code(
    "MOD027",
    Severity.ERROR,
    en=Text(
        "LoRA setting out of range",
        "{field} = {value} is out of range: it must be {rule}.",
        "Other values have no meaning.",
        ("Typical values: r 8 to 64, alpha r to 2r, dropout 0 to 0.1.",),
    ),
    zh=Text(
        "LoRA 设置超出范围",
        "{field} = {value} 超出范围：应为 {rule}。",
        "其他取值没有意义。",
        ("常用取值：r 为 8 至 64，alpha 为 r 至 2r，dropout 为 0 至 0.1。",),
    ),
)

DORA_ZERO_ROW = Code(
    "MOD028",
    Severity.ERROR,
    en=Text(
        "DoRA would divide by zero",
        "{num} targeted weight(s) have a row of zeros: {details}.",
        "DoRA divides each row by its norm; a zero row gives NaN in the first step.",
        ("Use LoRA without DoRA (use_dora: false).", "Leave these modules out of the targets."),
    ),
    zh=Text(
        "DoRA 会除以零",
        "{num} 个目标权重含有全零行：{details}。",
        "DoRA 用每行的范数作除数；全零行在第一步就得到 NaN。",
        ("不使用 DoRA（use_dora: false）。", "把这些模块排除在目标之外。"),
    ),
)

FREEZE_NO_MATCH = Code(
    "MOD029",
    Severity.ERROR,
    en=Text(
        "Freeze pattern matches nothing",
        "The pattern {pattern!r} matches no parameter and no module (did you mean: {close}).",
        "What was meant to be frozen would be trained.",
        ("Use a name as in {example}, or a glob such as *.layers.0.*",),
    ),
    zh=Text(
        "冻结模式没有匹配",
        "模式 {pattern!r} 没有匹配任何参数或模块（是否想写：{close}）。",
        "本应冻结的部分会被训练。",
        ("使用如 {example} 的名称，或 *.layers.0.* 之类的通配模式。",),
    ),
)

NOTHING_TRAINABLE = Code(
    "MOD030",
    Severity.ERROR,
    en=Text(
        "Nothing is left to train",
        "The freeze patterns freeze all {num} parameters.",
        "A run without trainable parameters does nothing.",
        ("Narrow the patterns.",),
    ),
    zh=Text(
        "没有可训练的参数", "冻结模式冻结了全部 {num} 个参数。", "没有可训练参数的训练不起作用。", ("缩小模式的范围。",)
    ),
)

SAVE_NON_FINITE = Code(
    "MOD031",
    Severity.ERROR,
    en=Text(
        "Refused to save NaN or infinity",
        "{num} of {total} tensors hold NaN or infinity and nothing was written: {names}.",
        "A checkpoint with such values cannot be used, and could displace a good one.",
        ("Go back to the last good checkpoint.",),
    ),
    zh=Text(
        "拒绝保存 NaN 或无穷",
        "{total} 个张量中有 {num} 个含 NaN 或无穷，未写入任何内容：{names}。",
        "这样的检查点无法使用，还可能取代完好的检查点。",
        ("回到最近的完好检查点。",),
    ),
)

UNKNOWN_LAYOUT = Code(
    "MOD032",
    Severity.ERROR,
    en=Text(
        "Unknown layout",
        "The layout {layout!r} cannot be written for the family {family!r}; possible: {possible}.",
        "Only some families have a layout of their own, and an adapter is always written as PEFT has it.",
        ("Use one of: {possible}. For an adapter, merge it first.",),
    ),
    zh=Text(
        "未知的布局",
        "模型族 {family!r} 无法写成布局 {layout!r}；可用：{possible}。",
        "只有部分模型族有自己的布局；适配器总是以 PEFT 的形式写出。",
        ("使用其中之一：{possible}。若是适配器，请先合并。",),
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

BAD_TINY = Code(
    "MOD036",
    Severity.ERROR,
    en=Text(
        "Unknown option of a tiny model",
        "{option!r} is no option of {name}: {reason}.",
        "Options are written tiny-llama:hidden=32,layers=1 with whole numbers.",
        ("Options: {known}.",),
    ),
    zh=Text(
        "微型模型的选项未知",
        "{option!r} 不是 {name} 的选项：{reason}。",
        "选项写作 tiny-llama:hidden=32,layers=1，值为整数。",
        ("可用选项：{known}。",),
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
    QUANTISED,
    ADAPTER_FOLDER,
    BAD_ADAPTER,
    TARGET_NOT_FOUND,
    BAD_LORA,
    DORA_ZERO_ROW,
    FREEZE_NO_MATCH,
    NOTHING_TRAINABLE,
    SAVE_NON_FINITE,
    UNKNOWN_LAYOUT,
    NON_FINITE_LOGITS,
    NO_CHAT_TEMPLATE,
    CHATML_GIVEN,
    BAD_TINY,
    BAD_SAMPLING,
    TINY_TOKENIZER_GIVEN,
)
