"""Codes of the look at the first batch and at how the first step is computed."""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity
from finitune.engine.look import codes_update

BLIND_ROW = Code(
    "DAT110",
    Severity.ERROR,
    Text(
        "a token attends to nothing",
        "{count} rows of {name} are -inf at every key, first {name}[{index}].",
        "Softmax over nothing is 0 / 0. Which kernels answer NaN and which answer 0 differs, and a masked NaN spreads "
        "all the same.",
        (
            "leave each token at least itself; mask with torch.finfo(dtype).min, once: twice of it is -inf",
            "attn_implementation='sdpa', whose math answers 0",
        ),
    ),
    Text(
        "有的词元不关注任何位置",
        "{name} 有 {count} 行在所有键上都是 -inf，第一个是 {name}[{index}]。",
        "对空集求 softmax 是 0 / 0。有的算子得 NaN，有的得 0；被屏蔽的 NaN 同样会扩散。",
        (
            "每个词元至少保留自己；用 torch.finfo(dtype).min 屏蔽且只加一次：加两次就是 -inf",
            "使用 attn_implementation='sdpa'，其算法得 0",
        ),
    ),
)

INPUT_NOT_FINITE = Code(
    "DAT111",
    Severity.ERROR,
    Text(
        "the batch holds a NaN or inf",
        "{name}[{index}] is {value}; {bad} of {total} elements of {name} are not finite, in rows {row_numbers}.",
        "Whatever is computed from it is not finite. It came with the data: no setting of the training cures it.",
        ("look at these rows and at what makes {name} of them", "leave such rows out when the data is prepared"),
    ),
    Text(
        "批次中有 NaN 或 inf",
        "{name}[{index}] 为 {value}；{name} 的 {total} 个元素中有 {bad} 个不是有限值，位于第 {row_numbers} 行。",
        "由它计算出的一切都不是有限的。它来自数据：任何训练设置都治不好它。",
        ("查看这些行，以及由它们生成 {name} 的过程", "准备数据时去掉这样的行"),
    ),
)

REWARD_MISSING = Code(
    "DAT113",
    Severity.ERROR,
    Text(
        "a reward is not a number",
        "{name}[{index}] is {value}; {bad} of {total} are not finite, in rows {row_numbers}.",
        "A reward function that gives nothing for one answer makes the mean and the deviation of its whole group NaN, "
        "and with them the advantages of all its answers.",
        (
            "let the reward function return a number for every answer, and leave out those without one",
            "use nanmean and a nan-safe deviation over the group",
        ),
    ),
    Text(
        "奖励不是数",
        "{name}[{index}] 为 {value}；{total} 个中有 {bad} 个不是有限值，位于第 {row_numbers} 行。",
        "奖励函数对某个回答没有给出数值，会使整组的均值和标准差变成 NaN，该组所有回答的优势也随之成为 NaN。",
        ("让奖励函数对每个回答都返回数值，并去掉没有奖励的回答", "在组内使用 nanmean 和能处理 NaN 的标准差"),
    ),
)

STOP_MASKED = Code(
    "DAT112",
    Severity.WARNING,
    Text(
        "the token that ends an answer is masked",
        "0 of {num_rows} rows supervise a stop token ({stop}); in {followed} of them it follows the last supervised "
        "token, with the label -100.",
        "A model that never sees the end supervised does not learn to stop. Masking every padding token does it where "
        "padding and end are the same token.",
        (
            "give padding a token of its own",
            "mask labels by the attention mask or by position, never by ids == pad_token_id",
        ),
    ),
    Text(
        "结束答案的词元被屏蔽了",
        "{num_rows} 行中有 0 行监督了停止词元（{stop}）；"
        "其中 {followed} 行里它紧跟在最后一个受监督的词元之后，标签为 -100。",
        "从未见过结尾受监督的模型学不会停下来。若填充与结尾是同一个词元，屏蔽所有填充就会造成这种情况。",
        ("为填充使用单独的词元", "按注意力掩码或位置屏蔽标签，不要按 ids == pad_token_id"),
    ),
)

EMPTY_ROWS = Code(
    "DAT114",
    Severity.WARNING,
    Text(
        "many rows have nothing to learn",
        "{num_empty} of {num_rows} rows so far ({percent} %) have no supervised token: every label is -100.",
        "Such rows cost their full price and teach nothing. In a batch with others the loss does not show them; alone "
        "in a micro-batch their mean is 0 / 0 and spoils the whole step.",
        (
            "truncate prompts, or raise the maximum length: an answer that is cut off leaves no target",
            "print the tokens around the response template: it may never match as it is tokenised in context",
            "drop rows with an empty answer",
        ),
    ),
    Text(
        "许多数据行没有可学的内容",
        "到目前为止 {num_rows} 行中有 {num_empty} 行（{percent} %）没有受监督的词元：所有标签都是 -100。",
        "这样的行花费全部代价却什么也教不了。与其他行同批时损失看不出来；单独构成微批次时其平均是 0 / 0，会毁掉整步。",
        (
            "截断提示或提高最大长度：被截掉的回答不会留下目标",
            "打印回答模板附近的词元：在上下文中分词后它可能从未匹配",
            "去掉回答为空的行",
        ),
    ),
)

CUT_DEPENDS = Code(
    "OPT112",
    Severity.WARNING,
    Text(
        "the gradient depends on how the batch is cut",
        "The {micros} micro-batches of the step have {fewest} to {most} supervised tokens. As one batch their gradient "
        "is another one: cosine {cosine}, norm {ratio} times.",
        "The mean over micro-batches of means over tokens weighs a token of a short micro-batch up to {weight} times "
        "as much as one of a long one. The loss of a step is the sum over its tokens, divided once by their number.",
        (
            "in loss_fn: the sum over tokens, times the number of micro-batches, divided by the tokens of the whole "
            "step",
            "or cut the batch so that the micro-batches have about the same number of supervised tokens",
        ),
    ),
    Text(
        "梯度取决于批次的切分方式",
        "该步的 {micros} 个微批次有 {fewest} 到 {most} 个受监督的词元。"
        "合为一批时梯度不同：余弦 {cosine}，范数为 {ratio} 倍。",
        "先按词元求平均、再对微批次求平均，会使短微批次中的词元权重最多达到长微批次的 {weight} 倍。"
        "一步的损失应是其所有词元之和，再除以一次总数。",
        (
            "在 loss_fn 中：对词元求和，乘以微批次数，再除以整步的词元数",
            "或在切分时让各微批次的受监督词元数大致相同",
        ),
    ),
)

AUTOCAST_ELSEWHERE = Code(
    "SYS440",
    Severity.WARNING,
    Text(
        "autocast is set for another device",
        "autocast asks for {asked} on {wrong}, and the {count} layers of the first step were computed on {device} in "
        "{dtype}.",
        "An autocast for another device type does nothing and says nothing. The run is slower and takes more memory "
        "than was meant, or compares badly with one on the right device.",
        ("torch.autocast(device_type=x.device.type, dtype=...)", "if fp32 is meant: no autocast at all"),
    ),
    Text(
        "autocast 设在了别的设备上",
        "autocast 要求在 {wrong} 上用 {asked}，而第一步的 {count} 个层是在 {device} 上以 {dtype} 计算的。",
        "针对其他设备类型的 autocast 不起作用，也不会提示。训练比预想的更慢、更占内存。",
        ("torch.autocast(device_type=x.device.type, dtype=...)", "若本意就是 fp32：不要使用 autocast"),
    ),
)

NOT_IN_HALF = Code(
    "SYS441",
    Severity.WARNING,
    Text(
        "a loss scale is in use, and nothing is computed in half precision",
        "A GradScaler multiplies the loss by {scale}, but all {count} layers of the first step gave out {dtype}.",
        "Scaling is there for fp16. In fp32 it cures nothing, and it hides that the half precision that was meant is "
        "not there.",
        ("compute under torch.autocast(device_type=x.device.type, dtype=torch.float16)", "or leave the scaler out"),
    ),
    Text(
        "使用了损失缩放，却没有任何计算使用半精度",
        "GradScaler 把损失乘以 {scale}，但第一步的全部 {count} 个层输出的都是 {dtype}。",
        "缩放是为 fp16 准备的。在 fp32 中它没有作用，还掩盖了本来想要的半精度并不存在。",
        ("在 torch.autocast(device_type=x.device.type, dtype=torch.float16) 下计算", "或去掉缩放器"),
    ),
)

CODES = (
    BLIND_ROW,
    INPUT_NOT_FINITE,
    STOP_MASKED,
    REWARD_MISSING,
    EMPTY_ROWS,
    CUT_DEPENDS,
    AUTOCAST_ELSEWHERE,
    NOT_IN_HALF,
    *codes_update.CODES,
)
