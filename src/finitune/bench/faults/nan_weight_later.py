"""T: one weight becomes NaN or infinite between two steps.

What happens in the field: a device that computes wrongly now and then, or memory that loses bits, without any error
message; the same step on another machine is fine. Threads: pytorch/torchtitan#951,
jade-hpc-gpu/jade-hpc-gpu.github.io#194.
"""

from __future__ import annotations

import math
from random import Random

from finitune.bench.faults import _draw
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "T"
CASES = ()
RUNS = (("llama_sft", "fp32"), ("lora", "bf16"), ("internlm2_sft", "fp16"))


def plant(load: Workload, random: Random) -> Expected:
    """One element of a matrix, trained or frozen, is no number any more after a drawn step."""
    step, _ = load.place(random)
    name, parameter, index = _draw.element(random, _draw.matrices(load))
    value = random.choice((math.nan, math.inf, -math.inf))

    def spoil() -> None:
        parameter.data.view(-1)[index] = value

    load.between(step, spoil)
    return Expected(
        says=f"{name}[{index}] becomes {value} after step {step}",
        step=step + 1,
        codes=("SYS403",),
        places=(("parameter", name),),
        remedies=("repair_tensor", "roll_back", "retry"),
        never=("DAT", "OPT", "NUM4", "MOD"),
        data={"step": step, "parameter": name, "index": index, "value": str(value)},
    )
