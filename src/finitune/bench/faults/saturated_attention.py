"""W: queries and keys are so large that softmax saturates, and in fp16 they leave its range.

What happens in the field: attention without scaling, or q/k weights that grew; each token looks at a single other one,
gradients of q and k vanish or spike, and half precision overflows in the end.
Threads: NVIDIA/TransformerEngine#1245, huggingface/transformers#45676.
"""

from __future__ import annotations

from random import Random

from finitune.bench.faults import _draw
from finitune.bench.faults._measure import FP16_MAX, largest
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "W"
CASES = ()
RUNS = (("pretrained_sft", "fp16"), ("llama_sft", "fp16"))


def plant(load: Workload, random: Random) -> Expected:
    """q_proj or k_proj of a layer gives out 1.5 to 100 times the largest fp16; the other is 1 to 100 times as large."""
    layer, loud = random.choice(load.layers), random.choice(("q_proj", "k_proj"))
    module = f"{layer}.self_attn.{loud}"
    other = f"{layer}.self_attn.{'k_proj' if loud == 'q_proj' else 'q_proj'}"
    overshoot = _draw.log_uniform(random, 1.5, 100.0)
    load.weight(module).mul_(overshoot * FP16_MAX / largest(load, [module])[1][module])
    load.weight(other).mul_(_draw.log_uniform(random, 1.0, 100.0))
    return Expected(
        says=f"{module} gives out {_draw.spelled(overshoot * FP16_MAX)} in fp32; softmax is saturated",
        step=1,
        codes=("NUM400",),
        places=(("module", module),),
        remedies=("fp32_modules", "bf16", "fp32"),
        never=("DAT", "OPT", "SYS", "MOD"),
        reference="fp32",
        data={"module": module, "overshoot": overshoot},
    )
