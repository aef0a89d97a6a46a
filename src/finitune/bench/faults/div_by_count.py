"""K: a mean over a span that is empty in one row is 0 / 0.

A mean by answer, by turn or by image: sum of the losses over the number of the tokens, without a floor under it. The
row with an empty span makes the loss of its batch NaN; in any other batch nothing is wrong.
Threads: huggingface/trl#3237, MakazhanAlpamys/Soup#342.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from finitune.bench.faults._draw import log_uniform
from finitune.bench.faults._rows import first_step, found, in_micro
from finitune.bench.workload import Batch, Expected, LossFn, Workload

FAULT_CLASS = "K"
CASES = ()
RUNS = (("llama_sft", "fp32"), ("llama_sft", "bf16"), ("internlm2_sft", "fp32"))


def plant(load: Workload, random: Random) -> Expected:
    """A small second loss, the mean of each row over a span of it, is added; the span of the row drawn is empty."""
    step, row = load.place(random)
    name = load.rows[step - 1][row]
    factor = log_uniform(random, 1e-6, 1e-3)
    span_tokens = random.randint(1, 6)
    for batch in load.batches:
        batch["span"] = batch["attention_mask"].clone()
        batch["span"][:, span_tokens + 1 :] = 0
    for at, place in found(load, name):
        micro, index = in_micro(load, at, place)
        micro["span"][index] = 0
    load.loss = _with_spans(factor)
    first = first_step(load, name)
    return Expected(
        says=f"the span of row {name} is empty and its mean 0 / 0 in the loss, first seen at step {first}",
        step=first,
        codes=("NUM404",),
        places=(("row", name),),
        remedies=("skip_rows", "drop_batch"),
        never=("OPT", "SYS", "MOD", "NUM400", "NUM401"),
        data={"row": name, "factor": factor, "span_tokens": span_tokens},
    )


def _with_spans(factor: float) -> LossFn:
    def loss(model: Any, batch: Batch) -> Tensor:
        plain = {k: v for k, v in batch.items() if k != "span"}
        output = model(**plain, use_cache=False)
        total: Tensor = output.loss
        if "span" not in batch:
            return total
        targets_BT = batch["labels"][:, 1:]
        losses_BT = F.cross_entropy(output.logits[:, :-1].float().transpose(1, 2), targets_BT, reduction="none")
        span_BT = batch["span"][:, 1:]
        means_B: Tensor = (losses_BT * span_BT).sum(1) / span_BT.sum(1)
        return total + factor * means_B.mean()

    return loss
