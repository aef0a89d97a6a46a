"""Codes of the look at a run before and in its first step: what is wrong with weights, rows of tokens and gradients."""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.types import Severity
from finitune.engine.look import codes_state, codes_step

NOT_FINITE = Code(
    "MOD110",
    Severity.ERROR,
    Text(
        "a weight is not finite before the first step",
        "{bad} of {total} elements of {name} ({dtype}) are not finite, first {name}[{index}] = {value}; {count} "
        "tensors in all. {told}",
        "No step that uses them can be finite, and nothing in the training made them. A masked position is no "
        "shelter: 0 times NaN is NaN. A tensor that is NaN all over was never given values; single infinite elements "
        "of a half-precision tensor were too large for the format that they were cast to.",
        (
            "load the weights again; look at the list of missing keys, and compare the file with its published hash",
            "if the row is that of the padding token: set it to 0",
            "if it is inf after a cast to fp16: keep this tensor in fp32, or use bf16",
        ),
    ),
    Text(
        "第一步之前权重就不是有限的",
        "{name}（{dtype}）的 {total} 个元素中有 {bad} 个不是有限值，第一个是 {name}[{index}] = {value}；"
        "共有 {count} 个这样的张量。{told}",
        "用到它们的步不可能有限，而且这不是训练造成的。被屏蔽的位置也不安全：0 乘以 NaN 还是 NaN。"
        "整个都是 NaN 的张量从未被赋值；半精度张量中个别无穷大的元素在转换时超出了该格式的范围。",
        (
            "重新加载权重；查看缺失键的列表，并把文件与公布的哈希比较",
            "若该行属于填充词元：将其设为 0",
            "若转换为 fp16 后变成 inf：该张量保持 fp32，或使用 bf16",
        ),
    ),
)

DEAD_LOGITS = Code(
    "MOD111",
    Severity.WARNING,
    Text(
        "the output is dead: all tokens are equally likely",
        "The loss of the first step is {loss}, and guessing among {vocabulary} tokens gives {guess}. The logits of one "
        "position differ by no more than {spread}; {num_zero} of {num_trained} trained tensors have a gradient of 0. "
        "{head} has a root mean square of {rms}.",
        "A head or a body without signal gives every token the same score. The loss looks ordinary, and what the "
        "checkpoint knew is gone: it was not loaded, or in the wrong scale.",
        (
            "compare the norms of {head} and of the final norm with those in the checkpoint's files",
            "check the missing keys of the load, and whether head and embedding are meant to be tied",
            "if this is training from scratch with a head of zeros on purpose: nothing",
        ),
    ),
    Text(
        "输出是死的：所有词元的概率相同",
        "第一步的损失为 {loss}，而在 {vocabulary} 个词元中猜测得 {guess}。同一位置的 logits 相差不超过 {spread}；"
        "{num_trained} 个训练的张量中有 {num_zero} 个梯度为 0。{head} 的均方根为 {rms}。",
        "没有信号的输出层或主体会给每个词元相同的分数。损失看起来正常，但检查点学到的东西已不在：没有加载，或尺度不对。",
        (
            "把 {head} 和最后一个归一化层的范数与检查点文件中的比较",
            "检查加载时缺失的键，以及输出层与嵌入是否应当共享",
            "若是特意用全零输出层从头训练：无需处理",
        ),
    ),
)

BUFFER_DIFFERS = Code(
    "MOD112",
    Severity.ERROR,
    Text(
        "a computed buffer is not what the configuration says",
        "{name}[{index}] is {found}, and {module} computes {expected} from the configuration; {bad} of {total} "
        "elements differ.",
        "Such buffers are not in the checkpoint's files. Building on the meta device, to_empty() or a careless cast "
        "loses them in silence: the loss stays finite, and the model no longer knows where its tokens are.",
        (
            "build the model again on a real device, or compute {name} anew after to_empty()",
            "if the frequencies were changed on purpose: put the change into the configuration (rope_parameters)",
        ),
    ),
    Text(
        "计算得到的 buffer 与配置不符",
        "{name}[{index}] 为 {found}，而 {module} 按配置算出 {expected}；{total} 个元素中有 {bad} 个不同。",
        "这类 buffer 不在检查点文件里。在 meta 设备上构建、to_empty() 或不当的类型转换会悄悄丢失它们："
        "损失仍然有限，但模型不再知道词元的位置。",
        (
            "在真实设备上重新构建模型，或在 to_empty() 之后重新计算 {name}",
            "若是有意修改频率：把修改写进配置（rope_parameters）",
        ),
    ),
)

HOT_ROWS = Code(
    "MOD113",
    Severity.WARNING,
    Text(
        "rows of the vocabulary are far too large",
        "{count} of {num_rows} rows of {name} are more than {limit} times as long as the median row ({median}): tokens "
        "{tokens}; the longest, token {token}, has a norm of {norm}.",
        "New tokens with rows of another scale dominate every sum that they enter: the loss starts far above that of "
        "guessing, and their gradients drown the others.",
        (
            "set new rows to the mean of the old ones (resize_token_embeddings does, with mean_resizing)",
            "if the rows came with the checkpoint: compare its vocabulary with the tokenizer's",
        ),
    ),
    Text(
        "词表中有些行过大",
        "{name} 的 {num_rows} 行中有 {count} 行超过中位行范数（{median}）的 {limit} 倍：词元 {tokens}；"
        "最长的是词元 {token}，范数为 {norm}。",
        "尺度不同的新词元会主导它们参与的每个求和：初始损失远高于随机猜测，其梯度淹没其余部分。",
        (
            "把新行设为旧行的平均值（resize_token_embeddings 的 mean_resizing 会这样做）",
            "若这些行来自检查点：比较其词表与分词器的词表",
        ),
    ),
)

NO_GRADIENT = Code(
    "MOD114",
    Severity.WARNING,
    Text(
        "trained tensors get no gradient",
        "{count} of {total} trained tensors have no gradient after the backward pass of the first step, though their "
        "modules were computed: {names}.",
        "The path from the loss to them is cut: a reentrant checkpoint over an input that needs no gradient, a "
        "detach(), a torch.no_grad() inside the model. They stay as they are, and only a slower loss tells.",
        (
            "checkpoint(..., use_reentrant=False), or model.enable_input_require_grads()",
            "look for detach(), .data and torch.no_grad() on the way from {first} to the loss",
            "if they are not meant to be trained: requires_grad_(False)",
        ),
    ),
    Text(
        "被训练的张量得不到梯度",
        "第一步反向传播后，{total} 个训练的张量中有 {count} 个没有梯度，尽管它们的模块参与了计算：{names}。",
        "从损失到它们的路径断了：对不需要梯度的输入使用可重入检查点、detach()，或模型内部的 torch.no_grad()。"
        "它们保持不变，只有下降更慢的损失会透露这一点。",
        (
            "checkpoint(..., use_reentrant=False)，或 model.enable_input_require_grads()",
            "查找从 {first} 到损失之间的 detach()、.data 和 torch.no_grad()",
            "若本不打算训练它们：requires_grad_(False)",
        ),
    ),
)

NEVER_FILLED = Code(
    "MOD115",
    Severity.ERROR,
    Text(
        "a weight looks as if it had never been given values",
        "{name} {shape}: largest magnitude {largest}, root mean square {rms} (median of the model: {median}), {tiny} % "
        "of its elements are smaller than 1e-30.",
        "Memory that is allocated and not written holds whatever was there before. Where a key is missing in the "
        "checkpoint and the module was built with torch.empty, that is the weight.",
        (
            "check the missing keys of the load; initialise {name}",
            "build the model under torch.use_deterministic_algorithms(True): unwritten memory is NaN then",
        ),
    ),
    Text(
        "某个权重看起来从未被赋值",
        "{name} {shape}：最大幅值 {largest}，均方根 {rms}（模型的中位数：{median}），{tiny} % 的元素小于 1e-30。",
        "分配后未写入的内存里是先前的内容。若检查点缺少某个键，而模块用 torch.empty 构建，权重就是这些内容。",
        (
            "检查加载时缺失的键；初始化 {name}",
            "在 torch.use_deterministic_algorithms(True) 下构建模型：未写入的内存会是 NaN",
        ),
    ),
)

BEYOND_HALF = Code(
    "MOD116",
    Severity.ERROR,
    Text(
        "a weight is too large for the format it is computed in",
        "{name}[{index}] is {value}; products are computed in fp16, whose largest number is 65504. {count} tensors are "
        "concerned.",
        "The cast to fp16 makes it infinite in every forward pass. The activations have no part in it.",
        ("compute in bf16 or fp32", "keep {name} in fp32: its module under autocast(enabled=False)"),
    ),
    Text(
        "权重超出了计算格式的范围",
        "{name}[{index}] 为 {value}；乘积以 fp16 计算，其最大数为 65504。涉及 {count} 个张量。",
        "转换为 fp16 会在每次前向传播中使其变为无穷大，与激活值无关。",
        ("用 bf16 或 fp32 计算", "让 {name} 保持 fp32：其模块放在 autocast(enabled=False) 中"),
    ),
)

ONE_EXPERT = Code(
    "MOD117",
    Severity.WARNING,
    Text(
        "nearly all tokens go to one expert",
        "{name} gives {percent} % of its probability to expert {expert} of {experts} (a fair share is {fair} %; at the "
        "look before: {before} %), on {tokens} tokens of the {looks} steps since step {since}.",
        "No number is bad, and the loss hides it: one expert does all the work, the others get no token and no "
        "gradient, so they will not come back by themselves.",
        (
            "check that the router's weight and bias came with the checkpoint, and that nothing is added to its input",
            "check that the balance loss has a gradient at {name} (output_router_logits=True) before its coefficient "
            "is tuned",
            "compute router logits and softmax in fp32; a z-loss keeps the logits small",
        ),
    ),
    Text(
        "几乎所有词元都进入同一个专家",
        "{name} 把 {percent} % 的概率给了 {experts} 个专家中的第 {expert} 个（平均份额为 {fair} %；上次查看时为 "
        "{before} %），依据自第 {since} 步起 {looks} 步的 {tokens} 个词元。",
        "没有任何数值异常，损失也看不出来：一个专家承担全部工作，其他专家得不到词元也得不到梯度，因此不会自行恢复。",
        (
            "检查路由器的权重和偏置是否随检查点加载，以及是否有东西加到了它的输入上",
            "在调整均衡损失的系数之前，检查它在 {name} 上是否有梯度（output_router_logits=True）",
            "路由器的 logits 和 softmax 用 fp32 计算；z-loss 可使 logits 保持较小",
        ),
    ),
)

DEAD_BODY = Code(
    "MOD118",
    Severity.WARNING,
    Text(
        "the frozen layers add nothing",
        "What leaves the last of the {count} frozen layers of {body} differs by {percent} % from what enters the "
        "first. {name} lets the least through: its root mean square times the root of its width is {gain}.",
        "Layers add to a stream that a trained model multiplies. Layers of too small a scale, or of zeros, leave it as "
        "it is, and the norm behind them hides that: the model knows no more than its embeddings, and adapters cannot "
        "make up for it.",
        (
            "compare the norms of {name} and its neighbours with those in the checkpoint's files",
            "check the missing keys of the load, and scales that are applied twice (quantisation, conversion)",
        ),
    ),
    Text(
        "冻结的层没有任何作用",
        "{body} 共 {count} 个冻结层，最后一层的输出与第一层的输入仅相差 {percent} %。其中 {name} 透过的最少："
        "其均方根乘以宽度的平方根为 {gain}。",
        "每一层都向残差流中加入内容，训练好的模型会使其成倍增大。尺度过小或全为零的层让它保持不变，而其后的归一化掩盖了这一点："
        "模型只剩下嵌入的知识，适配器无法弥补。",
        (
            "把 {name} 及其相邻权重的范数与检查点文件中的比较",
            "检查加载时缺失的键，以及被应用了两次的缩放（量化、转换）",
        ),
    ),
)

CODES = (
    NOT_FINITE,
    DEAD_LOGITS,
    BUFFER_DIFFERS,
    HOT_ROWS,
    NO_GRADIENT,
    NEVER_FILLED,
    BEYOND_HALF,
    ONE_EXPERT,
    DEAD_BODY,
    *codes_state.CODES,
    *codes_step.CODES,
)
