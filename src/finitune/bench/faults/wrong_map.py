"""R: an optimizer keeps its second moments in 8 bits, with a map that is wrong.

What happens in the field: 8-bit Adam of some versions; NaN soon with it, never with a plain Adam on the same gradients.
Threads: bitsandbytes-foundation/bitsandbytes#227, bitsandbytes-foundation/bitsandbytes#152,
kohya-ss/sd-scripts#523.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor

from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "R"
CASES = ()
RUNS = (("llama_sft", "fp32"), ("internlm2_sft", "bf16"), ("lora", "fp32"))


class AdamWInBytes(torch.optim.AdamW):
    """AdamW whose second moments go through 8 bits before each update, from an update on."""

    from_update = 0
    first_negative = 256
    """Codes from here on are read as negative numbers."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """As AdamW, after the map."""
        for state in self.state.values():
            if state and float(state["step"]) >= self.from_update:
                self._through_bytes(state["exp_avg_sq"])
        return super().step(closure)

    def _through_bytes(self, second: Tensor) -> None:
        highest = second.max().clamp(min=1e-30)
        code = (second.clamp(min=0.0) / highest * 255).round()
        second.copy_(torch.where(code >= self.first_negative, code - 256, code) / 255 * highest)


def plant(load: Workload, random: Random) -> Expected:
    """From a drawn update on, the largest codes (the upper half, or fewer) are read as negative."""
    step, _ = load.place(random)
    first = random.choice((128, 192, 224, 250))
    optimizer: Any = load.optimizer
    optimizer.__class__ = AdamWInBytes
    optimizer.from_update, optimizer.first_negative = step - 1, first
    optimizer._patch_step_function()  # as its constructor would have done
    return Expected(
        says=f"from step {step} on second moments go through 8 bits, and codes from {first} on are read as negative",
        step=step,
        codes=("OPT404",),
        remedies=("reset_moments", "halt"),
        never=("DAT", "NUM4", "MOD", "OPT401", "OPT406"),
        reference="",
        data={"step": step, "first_negative": first},
    )
