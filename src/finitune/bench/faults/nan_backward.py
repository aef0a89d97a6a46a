"""F: the backward pass of one projection gives NaN for one row.

The forward pass is right; a fused or compiled kernel fails in the backward pass at what this row holds. Loss finite,
gradient NaN from that module down to the embedding; one update later every weight is NaN.
Threads: NVIDIA-NeMo/Automodel#2687, pytorch/pytorch#196678, hiyouga/LlamaFactory#8088.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from finitune.bench.faults._rows import bad_gradient, first_step, twins
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "F"
CASES = (15,)
RUNS = (("llama_sft", "fp32"), ("internlm2_sft", "fp32"), ("llama_sft", "bf16"))


def plant(load: Workload, random: Random) -> Expected:
    """The gradient of one element of the output of a linear layer is NaN, or infinite, wherever the row comes up."""
    step, row = load.place(random)
    bad, name = load.row_ids(step)[row], load.rows[step - 1][row]
    module = random.choice(load.projections())
    token, value = random.randrange(len(bad)), random.choice((float("nan"), float("inf")))
    there = [torch.zeros(0, dtype=torch.bool)]

    def look(kwargs: dict[str, Any]) -> None:
        there[0] = load.has(kwargs["input_ids"], bad)

    def spoil(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        if not bool(there[0].any()):
            return output
        spot = torch.zeros(output.shape, dtype=torch.bool)
        spot[there[0], token, 0] = True
        return bad_gradient(output, spot, value)

    load.decoder_inputs(look)
    load.model.get_submodule(module).register_forward_hook(spoil)
    names = twins(load, bad)
    first = first_step(load, *names)
    return Expected(
        says=f"the backward pass of {module} gives {value} for row {name}, first seen at step {first}",
        step=first,
        codes=codes_of(module),
        places=(("module", module), *(("row", n) for n in names)),
        remedies=("skip_rows",),
        never=("OPT", "SYS", "NUM400", "NUM402", "MOD"),
        data={"row": name, "module": module, "token": token, "value": str(value)},
    )


def codes_of(module: str) -> tuple[str, ...]:
    """A module's own mathematics, or, for the projections around it, the attention kernel."""
    return ("NUM403", "NUM405") if ".self_attn." in module else ("NUM405",)
