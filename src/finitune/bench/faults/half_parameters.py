"""D: the trained weights are fp16, and Adam's eps of 1e-8 is zero there.

What happens in the field: ``model.half()`` and AdamW, "to save memory". Loss and gradients of the first step are fine;
its update divides by sqrt(0) + 0 and leaves NaN, at any learning rate.
Threads: afiaka87/glide-finetune#5, cactus-compute/needle#53.
"""

from __future__ import annotations

from random import Random

import torch

from finitune.bench.faults import _draw
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "D"
CASES = (8,)
RUNS = (("llama_sft", "fp16"), ("internlm2_sft", "fp16"), ("pretrained_sft", "fp16"))


def plant(load: Workload, random: Random) -> Expected:
    """All weights become fp16, without autocast and scaler; eps is one that fp16 cannot hold, the rate 0.01 to 3 times.

    In fp32 it is the same run with fp32 weights, and nothing is wrong with it.
    """
    eps, rate = random.choice((1e-8, 1e-9, 1e-10)), _draw.log_uniform(random, 0.01, 3.0)
    foreach = random.choice((True, False))
    if load.precision == "fp16":
        load.precision = "fp32"  # of the context: the weights are half themselves
        for parameter in load.model.parameters():
            parameter.data = parameter.data.to(torch.float16)
    for group in load.optimizer.param_groups:
        group.update(eps=eps, foreach=foreach)
    load.rate = lambda _updates: rate
    return Expected(
        says=f"fp16 weights, AdamW with eps {eps}, foreach {foreach}, {_draw.spelled(rate)} times the rate",
        step=1,
        codes=("OPT400", "OPT110"),
        remedies=("adam_eps", "bf16", "fp32"),
        never=("DAT", "OPT401", "OPT406", "NUM4", "MOD", "SYS"),
        reference="fp32",
        data={"eps": eps, "foreach": foreach, "rate": rate},
    )
