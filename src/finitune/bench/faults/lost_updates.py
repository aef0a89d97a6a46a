"""J: the weights are bf16 and the learning rate is so small that nearly all updates are rounded away.

What happens in the field: pure bf16 fine-tuning at 1e-5 or less; no NaN, a flat loss, and a result worse than in fp32.
Threads: meta-pytorch/torchtune#2254, pytorch/ao#1124, Nerogar/OneTrainer#996.
"""

from __future__ import annotations

from random import Random

from finitune.bench.faults import _draw
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "J"
CASES = (22,)
RUNS = (("half_weights", "bf16"),)


def plant(load: Workload, random: Random) -> Expected:
    """The rate is 1e-6 to 1e-5; half a step of bf16 is 2^-9 to 2^-8 of a weight."""
    rate = _draw.log_uniform(random, 1e-6, 1e-5)
    usual = float(load.optimizer.param_groups[0]["lr"])
    load.rate = lambda _updates: rate / usual
    return Expected(
        says=f"bf16 weights at a learning rate of {_draw.spelled(rate)}",
        step=1,
        codes=("OPT402", "OPT111"),
        remedies=("fp32",),
        never=("DAT", "NUM4", "SYS", "MOD", "OPT401", "OPT406"),
        reference="",  # at such rates a short run loses too little for its loss to tell
        data={"rate": rate},
    )
