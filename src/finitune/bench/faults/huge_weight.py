"""B: a weight is larger than the largest number of fp16; the cast of it is inf, whatever the input.

What happens in the field: a bf16 checkpoint whose norm gives tiny numbers that the next weights make large again is
loaded or cast in fp16. In bf16 and fp32 the model is sound. Threads: huggingface/transformers#5651,
unslothai/unsloth#4014.
"""

from __future__ import annotations

from random import Random

from finitune.bench.faults import _draw
from finitune.bench.faults._measure import FP16_MAX
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "B"
CASES = (7,)
RUNS = (("lora", "fp16"),)
_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def plant(load: Workload, random: Random) -> Expected:
    """One channel of a frozen norm is made smaller, and all that reads it larger: in fp32 the model is as before."""
    layer, norm = random.choice(load.layers), random.choice(sorted(_READERS))
    weight = load.weight(f"{layer}.{norm}")
    channel, overshoot = random.randrange(weight.numel()), _draw.log_uniform(random, 1.05, 1e3)
    columns = [_draw.base(load, f"{layer}.{reader}").weight.data[:, channel] for reader in _READERS[norm]]
    factor = overshoot * FP16_MAX / max(float(c.abs().max()) for c in columns)
    weight[channel] /= factor
    for column in columns:
        column.mul_(factor)
    readers = [f"{layer}.{r}" for r, c in zip(_READERS[norm], columns, strict=True) if float(c.abs().max()) > FP16_MAX]
    names = [f"{r}.base_layer" for r in readers]
    return Expected(
        says=f"weights of {', '.join(map(_draw.short, readers))} reach {_draw.spelled(overshoot * FP16_MAX)}",
        step=1,
        codes=("NUM400",),
        places=(*(("module", n) for n in (*names, *readers)), *(("parameter", f"{n}.weight") for n in names)),
        remedies=("fp32_modules", "bf16", "fp32"),
        never=("DAT", "OPT", "SYS", "MOD"),
        reference="fp32",
        data={"modules": readers, "channel": channel, "overshoot": overshoot},
    )
