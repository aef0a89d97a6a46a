"""X: from a step on every computation gives NaN, whatever is changed.

What happens in the field: a broken installation or device. Nothing that can be tried cures it, and nothing that can be
tried tells why: the right answer is "unknown", with the evidence, and a stop at the last good state.
Threads: InternLM/xtuner#573, bigscience-workshop/Megatron-DeepSpeed#396.
"""

from __future__ import annotations

import math
from random import Random
from typing import Any

from torch import Tensor, nn

from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "X"
CASES = ()
RUNS = (("llama_sft", "fp32"), ("lora", "bf16"), ("llama_sft", "fp16"))


def plant(load: Workload, random: Random) -> Expected:
    """The logits are not finite from a drawn step on, for older weights and other batches as well."""
    step, _ = load.place(random)
    value = random.choice((math.nan, math.inf, -math.inf))

    def hook(_module: nn.Module, _args: Any, logits_BTV: Tensor) -> Tensor | None:
        return logits_BTV * value if load.step >= step else None

    load.model.get_output_embeddings().register_forward_hook(hook)  # type: ignore[operator]
    return Expected(
        says=f"all logits are multiplied by {value} from step {step} on",
        step=step,
        codes=("unknown",),
        remedies=("halt",),
        never=("DAT", "OPT", "NUM4", "MOD", "SYS"),
        reference="",
        data={"step": step, "value": str(value)},
    )
