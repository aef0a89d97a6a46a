"""H: rows of the head were never initialised: they hold whatever was in memory.

What happens in the field: a key is missing in the checkpoint and the module was made by ``torch.empty``; the loss is
NaN or astronomical at the first step, and other numbers at the next start. Threads: huggingface/transformers#46002,
meta-pytorch/torchtune#218.
"""

from __future__ import annotations

from random import Random

import torch

from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "H"
CASES = (18,)
RUNS = (("llama_sft", "fp32"), ("lora", "fp32"), ("internlm2_sft", "bf16"))


def plant(load: Workload, random: Random) -> Expected:
    """A share of the rows, or all, are random bits: numbers of any magnitude, some of them NaN."""
    name = next(n for n, _ in load.model.named_parameters() if n.endswith("lm_head.weight"))
    weight = load.parameter(name).data
    count = max(8, int(weight.shape[0] * random.choice((0.1, 0.5, 1.0))))
    rows = sorted(random.sample(range(weight.shape[0]), count))
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    bits = torch.randint(-(2**31), 2**31, (count, weight.shape[1]), generator=generator).to(torch.int32)
    weight[rows] = bits.view(torch.float32)
    weight[rows[0], random.randrange(weight.shape[1])] = float("nan")
    load.spoil()
    return Expected(
        says=f"{count} rows of {name} are random bits, {int((~weight.isfinite()).sum())} elements are not finite",
        step=0,
        codes=("MOD400", "MOD110", "MOD115", "SYS428"),
        places=(("parameter", name),),
        remedies=("halt",),
        never=("DAT", "OPT", "NUM4", "SYS40"),
        reference="",
        data={"parameter": name, "rows": rows},
    )
