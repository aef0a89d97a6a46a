"""H: the rotary frequencies are zero, or wrong, after loading: the model no longer knows the order of the tokens.

What happens in the field: non-persistent buffers are lost by ``to_empty``, or made for another base; no NaN, no missing
key, just a loss that is worse than it should be. Threads: meta-pytorch/torchtune#218, NVIDIA-NeMo/Automodel#1980.
"""

from __future__ import annotations

from random import Random

from finitune.bench.faults import _draw
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "H"
CASES = (20,)
RUNS = (("pretrained_sft", "fp32"), ("lora", "fp32"))


def plant(load: Workload, random: Random) -> Expected:
    """All frequencies are zero, or 10 to 1e4 times too large or too small."""
    name = f"{load.decoder}.rotary_emb.inv_freq"
    factor = random.choice((0.0, _draw.log_uniform(random, 10.0, 1e4), 1 / _draw.log_uniform(random, 10.0, 1e4)))
    load.model.get_buffer(name).mul_(factor)
    return Expected(
        says=f"{_draw.short(name)} times {_draw.spelled(factor)} from the start",
        step=0,
        codes=("MOD112", "MOD400"),
        places=(("buffer", name),),
        remedies=("repair_tensor", "halt"),
        never=("DAT", "OPT401", "OPT406", "NUM4", "SYS"),
        data={"buffer": name, "factor": factor},
    )
