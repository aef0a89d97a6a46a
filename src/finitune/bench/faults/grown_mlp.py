"""B: the gate, up and down projections of one layer are so large that its MLP leaves the range of fp16.

What happens in the field: models made in bf16 (T5, Gemma 3, GLM-4) run in fp16; the numbers between their layers go
beyond 65504 and become inf in the first step already. In bf16 and fp32 the same weights are fine.
Threads: huggingface/transformers#5651, unslothai/unsloth#4014, vllm-project/vllm#40290.
"""

from __future__ import annotations

from random import Random

from finitune.bench.faults import _draw
from finitune.bench.faults._measure import FP16_MAX, largest
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "B"
CASES = (5,)
RUNS = (("llama_sft", "fp16"), ("internlm2_sft", "fp16"), ("pretrained_sft", "fp16"))
_ROUNDS = 12


def plant(load: Workload, random: Random) -> Expected:
    """The layer's down_proj gives out 1.3 to 30 times the largest number of fp16; what goes into it is in range."""
    layer, overshoot = random.choice(load.layers), _draw.log_uniform(random, 1.3, 30.0)
    inner = _draw.log_uniform(random, 1e2, 3e4)  # what goes into down_proj
    down = f"{layer}.mlp.down_proj"
    grow = [load.weight(f"{layer}.mlp.{part}") for part in ("gate_proj", "up_proj")]
    for _ in range(_ROUNDS):  # silu bends: the product of gate and up grows by the square only in the end
        inputs, _outputs = largest(load, [down])
        for weight in grow:
            weight.mul_((inner / inputs[down]) ** 0.5)
    load.weight(down).mul_(overshoot * FP16_MAX / largest(load, [down])[1][down])
    return Expected(
        says=f"{down} gives out {_draw.spelled(overshoot * FP16_MAX)} in fp32, {_draw.spelled(inner)} goes in",
        step=1,
        codes=("NUM400",),
        places=(("module", down),),
        remedies=("fp32_modules", "bf16", "fp32"),
        never=("DAT", "OPT", "SYS", "MOD"),
        reference="fp32",
        data={"module": down, "overshoot": overshoot, "inner": inner},
    )
