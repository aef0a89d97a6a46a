"""F: from a step on, the backward pass of one module gives NaN, whatever comes in.

A compiled graph that was built anew for another shape, a kernel that was chosen anew, a library that was reloaded: from
then on every batch fails, earlier ones as well. Weights, batches and the forward pass are in order.
Threads: NVIDIA-NeMo/Automodel#2687, hiyouga/LlamaFactory#9567, pytorch/pytorch#196678.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from finitune.bench.faults._draw import log_uniform
from finitune.bench.faults._rows import bad_gradient
from finitune.bench.faults.nan_backward import codes_of
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "F"
CASES = ()
RUNS = (("llama_sft", "fp32"), ("internlm2_sft", "fp32"), ("llama_sft", "bf16"))


def plant(load: Workload, random: Random) -> Expected:
    """A share of the gradient of a linear layer's output is NaN from the drawn step on."""
    step, _ = load.place(random)
    module = random.choice(load.projections())
    share = log_uniform(random, 1e-3, 1.0)

    def spoil(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        if load.step < step:
            return output
        count = max(1, round(share * output.numel()))
        return bad_gradient(output, (torch.arange(output.numel()) < count).view(output.shape))

    load.model.get_submodule(module).register_forward_hook(spoil)
    return Expected(
        says=f"from step {step} on, {100 * share:.2g} % of what the backward pass of {module} starts from is NaN",
        step=step,
        codes=codes_of(module),
        places=(("module", module),),
        remedies=("halt",),
        never=("DAT", "OPT", "NUM400", "NUM402", "MOD4"),
        reference="",
        data={"module": module, "share": share},
    )
