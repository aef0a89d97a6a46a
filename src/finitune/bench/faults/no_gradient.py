"""M: no gradient reaches the adapters of the first layers; the others train.

What happens in the field: checkpointing of the reentrant kind over frozen inputs, or a detach that was left in. The
loss is right and falls a little; lora_B of the layers that are cut off stays zero.
Threads: locuslab/open-unlearning#178, huggingface/transformers#26221, huggingface/transformers#23990.
"""

from __future__ import annotations

from random import Random
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finitune.bench.faults import _draw
from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "M"
CASES = (27,)
RUNS = (("lora", "fp32"), ("lora", "bf16"))


def plant(load: Workload, random: Random) -> Expected:
    """The first layers are checkpointed over frozen inputs, or what they give out is detached."""
    layers = load.layers
    last = random.randrange(len(layers) - 1)
    kind = random.choice(("reentrant checkpoint", "detach"))
    for name in layers[: last + 1]:
        layer = load.model.get_submodule(name)
        if kind == "detach":
            layer.register_forward_hook(_detached)
        else:
            _checkpointed(layer)
    lost = [
        n for n, _ in _draw.matrices(load, trained=True) if n.startswith(tuple(f"{n}." for n in layers[: last + 1]))
    ]
    return Expected(
        says=f"{kind}: no gradient reaches {len(lost)} adapters, first {_draw.short(lost[0])}",
        step=1,
        codes=("MOD401", "MOD114"),
        places=tuple(("parameter", n) for n in lost),
        remedies=("none", "halt"),
        never=("DAT", "NUM4", "SYS", "OPT401", "OPT402", "OPT406"),
        reference="",
        data={"kind": kind, "parameters": lost},
    )


def _detached(_module: nn.Module, _args: Any, output: Any) -> Any:
    return output.detach() if isinstance(output, Tensor) else (output[0].detach(), *output[1:])


def _checkpointed(layer: nn.Module) -> None:
    """The layer computes under a reentrant checkpoint, as ``gradient_checkpointing_enable`` used to do."""
    plain: Any = layer.forward

    def forward(states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(lambda x: plain(x, *args, **kwargs), states, use_reentrant=True)

    layer.forward = forward
