"""N: one row has a weight in the loss that is no finite number.

Weights by length, frequency or source are computed beforehand: one over a count of 0 is infinite, 0 / 0 is NaN. The
row itself is fine; its weight makes the loss of every batch with it inf or NaN.
Threads: NVIDIA/Megatron-LM#780, TIGER-AI-Lab/MAmmoTH#36.
"""

from __future__ import annotations

import math
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finitune.bench.faults._rows import first_step, found, in_micro
from finitune.bench.workload import Batch, Expected, Workload

FAULT_CLASS = "N"
CASES = ()
RUNS = (("llama_sft", "fp32"), ("llama_sft", "bf16"), ("internlm2_sft", "fp32"))


def plant(load: Workload, random: Random) -> Expected:
    """The loss takes weights of rows, all 1 but one."""
    step, row = load.place(random)
    name = load.rows[step - 1][row]
    value = random.choice((math.inf, math.nan, -math.inf))
    for batch in [*load.batches, *load.held_out]:
        batch["weights"] = torch.ones(len(batch["input_ids"]))
    for at, place in found(load, name):
        micro, index = in_micro(load, at, place)
        micro["weights"][index] = value
    load.loss = weighted_mean
    first = first_step(load, name)
    return Expected(
        says=f"row {name} has the weight {value}, first seen at step {first}",
        step=first,
        codes=("DAT401",),
        places=(("row", name),),
        remedies=("skip_rows",),
        never=("OPT", "SYS", "MOD"),
        data={"row": name, "value": str(value)},
    )


def weighted_mean(model: Any, batch: Batch) -> Tensor:
    """Sum over supervised tokens, each times the weight of its row, over their number."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    targets_BT = batch["labels"][:, 1:]
    losses_BT = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets_BT, reduction="none")
    mean: Tensor = (losses_BT.sum(1) * batch["weights"]).sum() / (targets_BT != -100).sum()
    return mean
