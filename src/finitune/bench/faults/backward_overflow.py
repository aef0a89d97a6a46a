"""C: from a step on, the gradient inside one module is beyond fp16 at any loss scale that suits the others.

What happens in the field: the backward of one kernel or block (mixture of experts, fused rotary embedding) works with
numbers that are many powers of two above the rest. The scaler halves until that module fits; by then the gradients of
all the others are gone. The loss is finite and normal. Threads: unslothai/unsloth-zoo#866, deepspeedai/DeepSpeed#931.
"""

from __future__ import annotations

import math
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from finitune.bench.workload import Expected, Workload

FAULT_CLASS = "C"
CASES = ()
RUNS = (("llama_sft", "fp16"), ("internlm2_sft", "fp16"), ("pretrained_sft", "fp16"))
_LARGEST_POWER = 15
"""Of two, in fp16."""


def plant(load: Workload, random: Random) -> Expected:
    """Inside the module gradients are 2^k times as large, and in range at a loss scale of 2^-2 to 2^-16 only.

    Outside, and for the weights, they are as ever.
    Powers of two are exact: in fp32 the run computes what it computed before.
    """
    step, _ = load.place(random, 0.1, 0.5)
    module = random.choice(load.projections("o_proj", "down_proj"))
    fits_at = -random.randint(2, 16)
    power = _LARGEST_POWER - fits_at - math.floor(math.log2(_usual_gradient(load, module)))
    switch = _Loud(load.model.get_submodule(module), 2.0**power)
    load.between(step - 1, switch.turn_on)
    return Expected(
        says=f"from step {step} on the gradient inside {module} is 2^{power} times as large; scale 2^{fits_at} fits",
        step=step,
        codes=("NUM401",),
        places=(("module", module), ("parameter", f"{module}.weight")),
        remedies=("fp32_modules", "bf16", "fp32"),
        never=("DAT", "OPT", "SYS", "MOD"),
        data={"module": module, "power": power, "fits_at": fits_at, "step": step},
    )


def _usual_gradient(load: Workload, module: str) -> float:
    """Largest element of the gradient of what a module gives out, in fp32, unscaled, in the first step."""
    found = [1e-30]

    def keep(_module: nn.Module, _inputs: Any, gradients: Any) -> None:
        found.append(float(gradients[0].abs().max()))

    handle = load.model.get_submodule(module).register_full_backward_hook(keep)
    torch.autograd.backward(load.loss(load.model, load.micros(1)[0]))
    handle.remove()
    load.optimizer.zero_grad(set_to_none=True)
    return max(found)


class _Times(torch.autograd.Function):
    """The identity; the gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * ctx.factor, None


def _times(states: Tensor, factor: float) -> Any:
    apply: Any = _Times.apply
    return apply(states, factor)


class _Loud:
    """Makes the backward of a linear layer loud inside, once turned on."""

    def __init__(self, module: nn.Module, factor: float) -> None:
        self.module, self.factor, self.on = module, factor, False
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after)
        for parameter in module.parameters():
            parameter.register_hook(self._quiet)  # type: ignore[no-untyped-call]

    def turn_on(self) -> None:
        """From the next step on."""
        self.on = True

    def _before(self, _module: nn.Module, args: Any) -> Any:
        return (_times(args[0], 1 / self.factor), *args[1:]) if self.on else None

    def _after(self, _module: nn.Module, _args: Any, output: Tensor) -> Any:
        return _times(output, self.factor) if self.on else None

    def _quiet(self, gradient: Tensor) -> Tensor:
        return gradient / self.factor if self.on else gradient
