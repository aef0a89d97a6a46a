"""T: a high bit of one fp32 weight flips between two steps.

What happens in the field: memory without ECC, or a device that computes wrongly now and then; the loss may even stay
finite. Threads: pytorch/torchtitan#951, microsoft/dion#76.
"""

from __future__ import annotations

from random import Random

import torch

from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "T"
CASES = ()
RUNS = (("llama_sft", "fp32"), ("internlm2_sft", "fp32"))


def plant(load: Workload, random: Random) -> Expected:
    """Bit 30 of one element becomes 1: the value grows by 2^128 and is huge, infinite or NaN."""
    step, _ = load.place(random)
    module = random.choice(load.projections())
    parameter = load.parameter(f"{module}.weight")
    index = random.randrange(parameter.numel())

    def flip() -> None:
        parameter.data.view(-1).view(torch.int32)[index] ^= 1 << 30

    load.between(step, flip)
    return Expected(
        says=f"bit 30 of {module}.weight[{index}] flips after step {step}",
        step=step + 1,
        codes=("SYS403",),
        places=(("parameter", f"{module}.weight"),),
        remedies=("repair_tensor", "roll_back", "retry"),
        never=("DAT", "OPT401"),
        data={"step": step, "parameter": f"{module}.weight", "index": index},
    )
