"""B: one token, which few rows hold, drives the MLP of a layer beyond the range of fp16; all others are as ever.

What happens in the field: massive activations sit on a few tokens; the run is fine until the first row with such a
token, and fails on it in every epoch. The row is not to blame: in bf16 and fp32 it is fine.
Threads: unslothai/unsloth#4014, vllm-project/vllm#40290.
"""

from __future__ import annotations

import math
from random import Random
from typing import Any

from torch import Tensor, nn

from finitune.bench.faults import _draw
from finitune.bench.faults._measure import FP16_MAX, Tokens, largest
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "B"
CASES = (6,)
RUNS = (("llama_sft", "fp16"), ("internlm2_sft", "fp16"), ("pretrained_sft", "fp16"))


def plant(load: Workload, random: Random) -> Expected:
    """Where the token is, what up_proj gives out is 2^k times as large, and what down_proj makes of it 2^k smaller.

    Powers of two are exact, so in fp32 the model computes what it computed before.
    """
    token, step = _draw.late_token(load, random)
    layer, overshoot = random.choice(load.layers), _draw.log_uniform(random, 4.0, 1e4)
    mlp = f"{layer}.mlp"
    usual = largest(load, [f"{mlp}.up_proj"], step)[1][f"{mlp}.up_proj"]
    factor = 2.0 ** math.ceil(math.log2(overshoot * FP16_MAX / usual))
    _amplify(load, mlp, token, factor)
    return Expected(
        says=f"token {token} makes {mlp} {_draw.spelled(factor)} times as loud inside, first at step {step}",
        step=step,
        codes=("NUM400",),
        places=(("module", mlp), ("module", f"{mlp}.up_proj"), ("module", f"{mlp}.down_proj")),
        remedies=("fp32_modules", "bf16", "fp32"),
        never=("DAT", "OPT", "SYS", "MOD"),
        reference="fp32",
        data={"token": token, "module": mlp, "factor": factor, "rows": _draw.rows_with(load, token)},
    )


def _amplify(load: Workload, mlp: str, token: int, factor: float) -> None:
    tokens = Tokens(load)

    def up(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        loud = tokens.factor(token, factor)
        return None if loud is None else output * loud.to(output.dtype)

    def down(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        loud = tokens.factor(token, 1 / factor)
        return None if loud is None else output * loud.to(output.dtype)

    load.model.get_submodule(f"{mlp}.up_proj").register_forward_hook(up)
    load.model.get_submodule(f"{mlp}.down_proj").register_forward_hook(down)
