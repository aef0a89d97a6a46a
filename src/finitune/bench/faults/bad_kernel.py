"""F: an attention kernel whose backward pass is wrong at certain lengths.

The forward pass is right and the loss is normal; at lengths with a certain remainder some gradients of queries, keys
or values are NaN. The data of such a batch is blamed; with the plain attention, or at another length, it is fine.
Threads: pytorch/pytorch#196678, NVIDIA-NeMo/Automodel#2687, hiyouga/LlamaFactory#9631.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from finitune.bench.faults._draw import log_uniform
from finitune.bench.faults._rows import bad_gradient, width_of
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "F"
CASES = (16,)
RUNS = (("llama_sft", "fp32"), ("internlm2_sft", "fp32"), ("llama_sft", "bf16"))
_PARTS = ("q", "k", "v")


def plant(load: Workload, random: Random) -> Expected:
    """At lengths L with L % divisor == remainder, a share of one input's gradient is NaN, in one layer or in all."""
    step, _ = load.place(random)
    divisor = random.randint(3, 16)
    remainder = width_of(load, step) % divisor
    part = random.choice(_PARTS)
    layers = [random.randrange(len(load.layers))] if random.random() < 0.5 else list(range(len(load.layers)))
    share = log_uniform(random, 0.01, 1.0)
    use(load, f"bench_{part}_{divisor}_{remainder}_{share}_{layers}", _kernel(divisor, remainder, part, layers, share))
    first = next(s for s in range(1, len(load.batches) + 1) if width_of(load, s) % divisor == remainder)
    stems = [f"{load.layers[i]}.self_attn" for i in layers]
    return Expected(
        says=f"at lengths L with L % {divisor} == {remainder} the gradient of {part} in layers {layers} is partly NaN, "
        f"first at step {first}",
        step=first,
        codes=("NUM403",),
        places=tuple(("module", name) for stem in stems for name in (stem, f"{stem}.{part}_proj")),
        remedies=("math_attention",),
        never=("DAT", "OPT", "SYS", "NUM400"),
        data={"divisor": divisor, "remainder": remainder, "part": part, "layers": layers, "share": share},
    )


def use(load: Workload, name: str, attention: Callable[..., Any]) -> None:
    """The model computes with this attention from now on."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    load.model.config._attn_implementation = name  # type: ignore[union-attr]


def _kernel(divisor: int, remainder: int, part: str, layers: Sequence[int], share: float) -> Callable[..., Any]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        inputs = {"q": query, "k": key, "v": value}
        if query.shape[2] % divisor == remainder and module.layer_idx in layers:
            inputs[part] = bad_gradient(inputs[part], _first(inputs[part], share))
        return sdpa_attention_forward(module, *inputs.values(), *args, **kwargs)  # type: ignore[arg-type]

    return attention


def _first(states: Tensor, share: float) -> Tensor:
    """The first elements (bool, of the shape of ``states``), at least one, as far as the share goes."""
    count = max(1, round(share * states.numel()))
    return (torch.arange(states.numel()) < count).view(states.shape)
