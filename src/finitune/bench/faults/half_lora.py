"""D: the adapters of LoRA are fp16, under a loss scaler.

What happens in the field: "Attempting to unscale FP16 gradients", at the first step; peft made the adapters in the type
of the base, and the advice is to go back to an old peft. Threads: huggingface/diffusers#6119,
afiaka87/glide-finetune#5.
"""

from __future__ import annotations

from random import Random

import torch

from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "D"
CASES = (9,)
RUNS = (("lora", "fp16"),)


def plant(load: Workload, random: Random) -> Expected:
    """All adapters, those of a layer, or those of one kind are fp16; in fp32 nothing is wrong."""
    trained = [(n, p) for n, p in load.model.named_parameters() if p.requires_grad]
    which = random.choice(("", *(f"{layer}." for layer in load.layers), "lora_A.", "lora_B.", ".self_attn.", ".mlp."))
    chosen = [(n, p) for n, p in trained if which in n]
    for _, parameter in chosen if load.precision == "fp16" else ():
        parameter.data = parameter.data.to(torch.float16)
    return Expected(
        says=f"{len(chosen)} of {len(trained)} adapter tensors are fp16, first {chosen[0][0]}",
        step=1,
        codes=("OPT400", "SYS425"),
        places=tuple(("parameter", n) for n, _ in chosen),
        remedies=("fp32_weights", "fp32", "bf16", "halt"),
        never=("DAT", "OPT401", "OPT406", "NUM4", "MOD", "SYS"),
        reference="fp32",
        data={"parameters": [n for n, _ in chosen]},
    )
