"""B: the checkpoint holds weights beyond 65504, the largest number of fp16, and the recipe asks for fp16.

What happens in the field: a bf16 checkpoint whose norm gives tiny numbers that the next weights make large again. In
bf16 and fp32 the model is sound; cast to fp16 the weight is infinite, whatever the input. The file shows it before the
first step. Threads: huggingface/transformers#5651, unslothai/unsloth#4014.
"""

from __future__ import annotations

from random import Random

from finitune.bench.faults import _draw, _recipe
from finitune.bench.faults._measure import FP16_MAX
from finitune.bench.recipe_load import RecipeLoad
from finitune.bench.workload import Expected

FAULT_CLASS = "B"
CASES = (7,)
RUNS = (("recipe_sft", "fp16"),)
_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def plant(load: RecipeLoad, random: Random) -> Expected:
    """One channel of a norm is made smaller, and all that reads it larger: in fp32 the model is as before."""
    layer, norm = random.choice(_recipe.layers(load)), random.choice(sorted(_READERS))
    tensors, readers = _recipe.stored(load), [f"{layer}.{reader}" for reader in _READERS[norm]]
    weight = tensors[f"{layer}.{norm}.weight"]
    channel, overshoot = random.randrange(weight.numel()), _draw.log_uniform(random, 1.05, 1e3)
    columns = [tensors[f"{reader}.weight"][:, channel] for reader in readers]
    factor = overshoot * FP16_MAX / max(float(c.abs().max()) for c in columns)
    weight[channel] /= factor
    for column in columns:
        column.mul_(factor)
    _recipe.store(load, tensors)
    # Such a channel cannot be trained at the rate of the others.
    load.overrides["freeze"] = '["*layernorm*"]'
    wide = [r for r, c in zip(readers, columns, strict=True) if float(c.abs().max()) > FP16_MAX]
    return Expected(
        says=f"weights of {', '.join(wide)} reach {_draw.spelled(overshoot * FP16_MAX)}",
        step=0,
        codes=("MOD116", "MOD014", "MOD015", "NUM400"),
        places=(*(("module", r) for r in wide), *(("parameter", f"{r}.weight") for r in wide)),
        remedies=("fp32_modules", "bf16", "fp32"),
        never=("DAT", "OPT", "SYS"),
        reference="fp32",
        data={"modules": wide, "channel": channel, "overshoot": overshoot},
    )
