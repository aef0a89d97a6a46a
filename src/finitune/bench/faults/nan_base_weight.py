"""H: a weight of the base model is NaN before the first step.

What happens in the field: a broken download or conversion, or a layer that nobody initialised. Everything is NaN from
the first step on, and nothing about the training has made it so. Threads: huggingface/transformers#46002,
NVIDIA-NeMo/Automodel#1980.
"""

from __future__ import annotations

import math
from random import Random

from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "H"
CASES = (17,)
RUNS = (("llama_sft", "fp32"), ("lora", "bf16"), ("internlm2_sft", "fp16"), ("mixtral", "fp32"))


def plant(load: Workload, random: Random) -> Expected:
    """One to some elements of a matrix or a norm are NaN or inf; there is no sound copy to take them from."""
    inside = f"{load.decoder}.layers."
    # An infinity in a LoRA matrix that is multiplied by zeros is a matter of its own: base weights only.
    named = [(n, p) for n, p in load.model.named_parameters() if n.startswith(inside) and "lora_" not in n]
    name, parameter = random.choice(named)
    value, count = random.choice((math.nan, math.inf, -math.inf)), random.choice((1, 5, 30))
    indices = sorted(random.sample(range(parameter.numel()), min(count, parameter.numel())))
    parameter.data.view(-1)[indices] = value
    load.spoil()
    return Expected(
        says=f"{len(indices)} elements of {name} are {value} from the start",
        step=0,
        codes=("MOD400", "MOD110", "SYS428"),
        places=(("parameter", name),),
        remedies=("halt",),
        never=("DAT", "OPT", "NUM4", "SYS40"),
        reference="",
        data={"parameter": name, "indices": indices, "value": str(value)},
    )
