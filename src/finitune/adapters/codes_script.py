"""Codes of what outlives a guarded script: its capsules and its saved state."""

from __future__ import annotations

from finitune.core.codes import Code, Text
from finitune.core.incident import Words
from finitune.core.types import Severity

SCRIPT_CAPSULE = Code(
    "SYS424",
    Severity.ERROR,
    Text(
        "this capsule comes from a script: it is replayed from there",
        "{path} was written by finitune.guard(...) at step {step}. It holds batch, weights, optimizer state and random "
        "states, and no code: the model and the loss function are your script's.",
        "Nothing was computed. Build model, optimizer and loss_fn as the script does; what they hold is put back "
        "afterwards. In Python:",
        (
            "import finitune",
            "done = finitune.replay({quoted}, model, optimizer, loss_fn{options})",
            "print(done)  # done.reproduced, done.reading, done.evidence",
        ),
    ),
    Text(
        "该胶囊来自脚本：请在脚本中重放",
        "{path} 由 finitune.guard(...) 在第 {step} 步写成。它包含批次、权重、优化器状态和随机状态，不含代码："
        "模型和损失函数属于你的脚本。",
        "什么都没有计算。请像脚本那样构建 model、optimizer 和 loss_fn；其内容之后会恢复原样。在 Python 中：",
        (
            "import finitune",
            "done = finitune.replay({quoted}, model, optimizer, loss_fn{options})",
            "print(done)  # done.reproduced、done.reading、done.evidence",
        ),
    ),
)

BAD_GUARD_STATE = Code(
    "SYS430",
    Severity.ERROR,
    Text(
        "the saved state of a guard cannot be taken over",
        "{problem}.",
        "Guard, model and optimizer are as they were before the call.",
        (
            "give what guard.state_dict() returned, read with torch.load(path, weights_only=True)",
            "load model, optimizer, scheduler and scaler first, then the guard",
            "without the guard's state: leave it out, and its incidents and cures begin anew",
        ),
    ),
    Text(
        "无法接管守护器的已存状态",
        "{problem}。",
        "守护器、模型和优化器都与调用之前相同。",
        (
            "给出 guard.state_dict() 的返回值，用 torch.load(path, weights_only=True) 读取",
            "先加载模型、优化器、调度器和 scaler，再加载守护器",
            "没有守护器状态时：省略即可，其事件和措施将重新开始",
        ),
    ),
)

GOES_ON_ELSEWHERE = Code(
    "SYS431",
    Severity.WARNING,
    Text(
        "the run does not go on where it was saved",
        "{name} is not what it was when guard.state_dict() was called at step {step}.",
        "The steps from here on are not those that the run would have made. Nothing was changed.",
        (
            "load model, optimizer, scheduler and scaler of the same moment, before the guard's state",
            "save all of them between two steps, in one file",
            "if you changed it on purpose: nothing is to be done",
        ),
    ),
    Text(
        "运行没有从保存之处继续",
        "{name} 与在第 {step} 步调用 guard.state_dict() 时不同。",
        "从这里开始的各步不再是原运行会做的那些步。没有做任何更改。",
        (
            "在加载守护器状态之前，加载同一时刻的模型、优化器、调度器和 scaler",
            "在两步之间把它们一起保存到一个文件",
            "若是有意更改：无需处理",
        ),
    ),
)

# -- sentences of a replay --------------------------------------------------------------------------------------------

OF_A_RECIPE = Words(
    "it comes from a recipe's run: finitune replay {path}", "它来自按配置的运行：finitune replay {path}"
)
NO_STATE_OF_ITS_OWN = Words(
    "it holds no weights (digest only), and those of the model that was given are others, first {name}: load the "
    "weights and optimizer state of before step {step}",
    "它不含权重（仅摘要），而给出的模型的权重不同，首先是 {name}：请加载第 {step} 步之前的权重和优化器状态",
)
NO_GENERATORS = Words(
    "the states of the random generators are not in the capsule: dropout differs",
    "胶囊中没有随机数生成器的状态：dropout 会不同",
)
OTHER_EPS = Words("the optimizer's eps is {now}, and was {was} then", "优化器的 eps 为 {now}，当时为 {was}")
OTHER_DEVICE = Words("computed on {now}, then on {was}", "现在在 {now} 上计算，当时在 {was} 上")
NO_BATCH = Words(
    "as_batch raised {error}; it is given the capsule's batch as dicts, lists and tensors",
    "as_batch 抛出 {error}；它得到的是以字典、列表和张量表示的胶囊批次",
)
LEFT_CHANGED = Words(
    "the loss function changed {name} in the model, which was not put back",
    "损失函数改变了模型中的 {name}，未能恢复",
)
CODES = (SCRIPT_CAPSULE, BAD_GUARD_STATE, GOES_ON_ELSEWHERE)
