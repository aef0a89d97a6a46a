"""T: a high bit of one fp32 weight flips in the memory of one rank; the other replicas are fine.

The ranks no longer hold the same model. Their gradients are averaged all the same, so what one rank computes from a
corrupt weight goes into all of them. Threads: pytorch/torchtitan#951, microsoft/dion#76.
"""

from __future__ import annotations

from random import Random

import torch
import torch.distributed as dist

from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "T"
CASES = ()
RUNS = (("gloo_sft", "fp32"),)


def plant(load: Workload, random: Random) -> Expected:
    """Bit 30 of one element becomes 1 on one rank: the value grows by 2^128 and is huge, infinite or NaN."""
    step, rank = load.place(random)[0], random.randrange(2)
    module = random.choice(load.projections())
    parameter = load.parameter(f"{module}.weight")
    index = random.randrange(parameter.numel())

    def flip() -> None:
        if not dist.is_initialized() or dist.get_rank() == rank:
            parameter.data.view(-1).view(torch.int32)[index] ^= 1 << 30

    load.between(step, flip)
    return Expected(
        says=f"bit 30 of {module}.weight[{index}] flips on rank {rank} after step {step}",
        step=step + 1,
        codes=("SYS403",),
        places=(("parameter", f"{module}.weight"),),
        remedies=("repair_tensor", "roll_back", "retry"),
        never=("DAT", "OPT401"),
        data={"step": step, "parameter": f"{module}.weight", "index": index, "rank": rank},
    )
