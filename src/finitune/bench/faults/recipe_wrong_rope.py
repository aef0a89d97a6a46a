"""H: config.json names another base of the rotary embedding than the checkpoint was trained with.

What happens in the field: a converter writes the default ``rope_theta``, or a fine-tune for long texts is loaded with
the config of its base. All is finite and works, only worse. Older checkpoints hold ``inv_freq`` itself, so that the
contradiction is in the folder. Threads: NVIDIA-NeMo/Automodel#1980, huggingface/transformers#46002.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch

from finitune.bench.faults import _draw, _recipe
from finitune.bench.recipe_load import RecipeLoad
from finitune.bench.workload import Expected

FAULT_CLASS = "H"
CASES = (20,)
RUNS = (("recipe_sft", "fp32"), ("recipe_sft", "bf16"))
_THETA, _HEAD_DIM = 1e4, 16


def plant(load: RecipeLoad, random: Random) -> Expected:
    """The stored frequencies are those of the training; the config's base is 4 to 1000 times larger or smaller."""
    factor = _draw.log_uniform(random, 4.0, 1e3)
    wrong = _THETA * (factor if random.random() < 0.5 else 1 / factor)
    tensors = _recipe.stored(load)
    inv_freq = 1.0 / _THETA ** (torch.arange(0, _HEAD_DIM, 2, dtype=torch.float32) / _HEAD_DIM)
    for layer in _recipe.layers(load):
        tensors[f"{layer}.self_attn.rotary_emb.inv_freq"] = inv_freq.clone()
    _recipe.store(load, tensors)
    _recipe.edit_json(load.base / "config.json", lambda config: _rewrite(config, wrong))
    return Expected(
        says=f"rope_theta is {_draw.spelled(wrong)} in config.json, {_draw.spelled(_THETA)} by the stored inv_freq",
        step=0,
        codes=("MOD042", "MOD112", "MOD400"),
        places=(("buffer", "rotary_emb.inv_freq"), ("module", "rotary_emb")),
        never=("NUM", "OPT", "DAT", "SYS"),
        reference="",
        data={"rope_theta": wrong},
    )


def _rewrite(config: dict[str, Any], theta: float) -> None:
    if "rope_parameters" in config:
        config["rope_parameters"]["rope_theta"] = theta
    else:
        config["rope_theta"] = theta
