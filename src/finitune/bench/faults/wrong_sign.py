"""R: an optimizer updates one group of the weights in the wrong direction.

What happens in the field: a home-made or ported optimizer with a sign wrong on one path (a fused kernel, a group with
its own settings). The loss rises steadily; a smaller rate makes it rise more slowly, which is taken for a cure.
Threads: bitsandbytes-foundation/bitsandbytes#152, microsoft/dion#76.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import nn

from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "R"
CASES = ()
RUNS = (("pretrained_sft", "fp32"), ("llama_sft", "fp32"), ("pretrained_sft", "bf16"))
_GROUPS = ("lm_head", "mlp", "self_attn", "embed_tokens")


class AdamWUphill(torch.optim.AdamW):
    """AdamW that goes uphill for some parameters, from an update on."""

    from_update = 0
    uphill: tuple[nn.Parameter, ...] = ()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """As AdamW, then twice back where the sign is wrong."""
        wrong = [p for p in self.uphill if p.grad is not None and self._made(p) >= self.from_update]
        before = [p.detach().clone() for p in wrong]
        done = super().step(closure)
        for parameter, old in zip(wrong, before, strict=True):
            parameter.copy_(2 * old - parameter)
        return done

    def _made(self, parameter: nn.Parameter) -> float:
        state = self.state.get(parameter)
        return float(state["step"]) if state else 0.0


def plant(load: Workload, random: Random) -> Expected:
    """From a drawn update on, all weights of one kind are moved the wrong way."""
    step, _ = load.place(random, 0.1, 0.4)
    part = random.choice(_GROUPS)
    optimizer: Any = load.optimizer
    optimizer.__class__ = AdamWUphill
    optimizer.from_update = step - 1
    optimizer.uphill = tuple(p for n, p in load.model.named_parameters() if f"{part}." in n)
    optimizer._patch_step_function()  # as its constructor would have done
    return Expected(
        says=f"from step {step} on the weights of {part} are updated in the wrong direction",
        step=step,
        codes=("OPT404",),
        remedies=("halt", "reset_moments"),
        never=("DAT", "NUM4", "MOD", "OPT401", "OPT406", "SYS403"),
        reference="",
        data={"step": step, "part": part},
    )
