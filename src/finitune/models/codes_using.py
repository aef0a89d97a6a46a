"""What can be wrong with quantisation, adapters, freezing, saving, tiny models and the cache."""

from finitune.core.codes import Code, Text
from finitune.core.types import Severity

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
        "No module is called {target!r} (did you mean: {close}).",
        (
            "A target that matches nothing would be ignored, and less would be trained than asked for. "
            "Modules that exist: {existing}."
        ),
        ('Use one of the existing names, "auto" or "all-linear".',),
    ),
    zh=Text(
        "LoRA 目标没有匹配",
        "没有名为 {target!r} 的模块（是否想写：{close}）。",
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

CACHE_UNUSABLE = Code(
    "MOD039",
    Severity.ERROR,
    en=Text(
        "The cache cannot be written",
        "The converted model cannot be written to the cache {path}: {reason}.",
        "A GGUF file is converted once into a folder there; it takes 4 bytes for each parameter.",
        ("Free some space, or set FINITUNE_CACHE to a folder that can be written.",),
    ),
    zh=Text(
        "无法写入缓存",
        "无法把转换后的模型写入缓存 {path}：{reason}。",
        "GGUF 文件会在那里转换一次并保存为文件夹，每个参数占 4 字节。",
        ("腾出空间，或把 FINITUNE_CACHE 设为可写的文件夹。",),
    ),
)

ATTENTION_CHANGED = Code(
    "MOD040",
    Severity.NOTE,
    en=Text(
        "Another attention kernel",
        "The model type {model_type} has no {asked} attention; {used} is used.",
        "Its attention does something that the fused kernel cannot do, such as capping the scores.",
        ("Nothing is to be done; attn_implementation: {used} says the same.",),
    ),
    zh=Text(
        "改用其他注意力内核",
        "模型类型 {model_type} 不支持 {asked} 注意力，改用 {used}。",
        "其注意力含有融合内核无法完成的运算，例如限制分数的上限。",
        ("无需处理；设置 attn_implementation: {used} 效果相同。",),
    ),
)

NOT_RESCALED = Code(
    "MOD041",
    Severity.ERROR,
    en=Text(
        "The residual stream cannot be rescaled",
        "With model.residual_scale: {factor} the logits of the model family {family} change by {change} of their size.",
        "Only a model that normalises by RMSNorm before every layer, without biases in the stream, gives the same "
        "answers at another size of its residual stream. (In half precision a large factor overflows at once.)",
        ("leave model.residual_scale at 1", "load the weights in fp32: precision fp32, fp16 or fp16-emulated"),
    ),
    zh=Text(
        "残差流无法缩放",
        "设置 model.residual_scale: {factor} 后，{family} 系列模型的 logits 变化了其大小的 {change}。",
        "只有在每层之前都用 RMSNorm 归一化、且残差流中没有偏置的模型，才会在残差流大小改变后给出同样的回答。"
        "（在半精度中，过大的倍数会立即溢出。）",
        ("将 model.residual_scale 保持为 1", "以 fp32 加载权重：precision 取 fp32、fp16 或 fp16-emulated"),
    ),
)

ROPE_DIFFERS = Code(
    "MOD042",
    Severity.WARNING,
    en=Text(
        "The rotary frequencies in the file are not those of config.json",
        "{name}[{index}] is {found} in the file (base {stored_base}), and {expected} by config.json (base {base}). "
        "{count} such tensors are in {folder}.",
        "The weights were trained with the frequencies in the file; the model is computed with those of config.json. "
        "All is finite and works, only worse: every token stands elsewhere than the weights expect it.",
        (
            "set rope_theta in config.json to {stored_base}, and rope scaling to what the model was trained with",
            "if the base was changed on purpose, to train on longer texts: take the tensors out of the file",
        ),
    ),
    zh=Text(
        "文件中的旋转位置频率与 config.json 不符",
        "{name}[{index}] 在文件中为 {found}（基数 {stored_base}），按 config.json 则为 {expected}（基数 {base}）。"
        "{folder} 中这样的张量共 {count} 个。",
        "权重是用文件中的频率训练的，而模型按 config.json 的频率计算。一切都是有限的，也能运行，只是更差："
        "每个词元都不在权重所期望的位置。",
        (
            "把 config.json 中的 rope_theta 设为 {stored_base}，并把 rope 缩放设为训练该模型时的设置",
            "若是为训练更长的文本而有意修改基数：从文件中去掉这些张量",
        ),
    ),
)

CODES = (
    ROPE_DIFFERS,
    NOT_RESCALED,
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
    BAD_TINY,
    CACHE_UNUSABLE,
    ATTENTION_CHANGED,
)
