"""G/T: one forward pass gives a NaN, and never again.

What happens in the field: a race between streams, a buffer that is read before it is written, or a device that computes
wrongly now and then. The same step on the same state is fine. Threads: deepspeedai/DeepSpeed#7965,
deepspeedai/DeepSpeed#4298, modelscope/ms-swift#2280.
"""

from __future__ import annotations

import math
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from finitune.bench.faults import _draw
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "G"
CASES = ()
RUNS = (("llama_sft", "fp32"), ("llama_sft", "bf16"), ("lora", "fp16"), ("mixtral", "fp32"))


def plant(load: Workload, random: Random) -> Expected:
    """Some elements of what one module gives out are NaN or inf in the first pass of a drawn step."""
    step, _ = load.place(random)
    module = random.choice(_draw.modules(load, "q_proj", "k_proj", "v_proj", "o_proj"))
    value, count = random.choice((math.nan, math.inf)), random.choice((1, 7, 100))
    place = random.random()
    done: list[int] = []

    def once(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        if load.step != step or done:
            return None
        done.append(step)
        spoilt = torch.zeros_like(output).view(-1)
        first = int(place * max(1, spoilt.numel() - count))
        spoilt[first : first + count] = value
        return output + spoilt.view_as(output)

    load.model.get_submodule(module).register_forward_hook(once)
    return Expected(
        says=f"{count} elements of the output of {module} are {value} in one forward pass of step {step}",
        step=step,
        codes=("SYS400",),
        remedies=("retry",),
        never=("DAT", "OPT", "NUM4", "MOD"),
        data={"step": step, "module": module, "count": count, "value": str(value)},
    )
