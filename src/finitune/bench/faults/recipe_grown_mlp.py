"""B: the gate, up and down projections of one layer are so large that its MLP leaves the range of fp16.

What happens in the field: models made in bf16 (T5, Gemma 3, GLM-4) are trained by a recipe that says fp16; the numbers
between their layers go beyond 65504 and become inf in the first step already.
Threads: huggingface/transformers#5651, unslothai/unsloth#4014, vllm-project/vllm#40290.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch

from finitune.bench.faults import _draw, _recipe
from finitune.bench.faults._measure import FP16_MAX
from finitune.bench.recipe_load import RecipeLoad
from finitune.bench.runs.recipe_sft import ids_of
from finitune.bench.workload import Expected
from finitune.models.tiny import tiny_llama
from finitune.numerics.seeds import generators_kept

FAULT_CLASS = "B"
CASES = (5,)
RUNS = (("recipe_sft", "fp16"),)
_ROUNDS = 12


def plant(load: RecipeLoad, random: Random) -> Expected:
    """The layer's down_proj gives out 1.3 to 30 times fp16's largest number in every row; what goes in is in range."""
    layer, overshoot = random.choice(_recipe.layers(load)), _draw.log_uniform(random, 1.3, 30.0)
    inner = _draw.log_uniform(random, 1e2, 3e4)  # what goes into down_proj
    tensors = _recipe.stored(load)
    with generators_kept():
        model: Any = tiny_llama(0, hidden=32, layers=2, heads=2, kv_heads=2, mlp=64)
    model.load_state_dict(tensors)
    mlp, rows = model.get_submodule(f"{layer}.mlp"), ids_of(load.rows)
    for _ in range(_ROUNDS):  # silu bends: the product of gate and up grows by the square only in the end
        most = float(_reach(model, mlp.down_proj, rows)[0].max())
        for part in (mlp.gate_proj, mlp.up_proj):
            part.weight.data.mul_((inner / most) ** 0.5)
    mlp.down_proj.weight.data.mul_(overshoot * FP16_MAX / float(_reach(model, mlp.down_proj, rows)[1].min()))
    _recipe.store(load, {name: tensor.detach() for name, tensor in model.state_dict().items()})
    down = f"{layer}.mlp.down_proj"
    return Expected(
        says=f"{down} gives out {_draw.spelled(overshoot * FP16_MAX)} in fp32, {_draw.spelled(inner)} goes in",
        step=1,
        codes=("NUM400",),
        places=(("module", down),),
        remedies=("fp32_modules", "bf16", "fp32"),
        never=("DAT", "OPT", "SYS", "MOD4"),
        reference="fp32",
        data={"module": down, "overshoot": overshoot, "inner": inner},
    )


def _reach(model: Any, module: Any, rows: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """By row, the largest magnitudes that go into a module and come out of it, padding left out; (B,) each."""
    ids_BT, mask_BT = rows
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(_module: Any, args: Any, out_BTD: torch.Tensor) -> None:
        real_BT1 = mask_BT[..., None].bool()
        seen.append((_largest(args[0], real_BT1), _largest(out_BTD, real_BT1)))

    handle = module.register_forward_hook(look)
    with torch.no_grad():
        model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
    handle.remove()
    return seen[0]


def _largest(tensor_BTD: torch.Tensor, real_BT1: torch.Tensor) -> torch.Tensor:
    return tensor_BTD.abs().masked_fill(~real_BT1, 0.0).amax((1, 2))
