"""Leaner forward and backward for the two elementwise parts of a Llama layer, in full precision.

On a CPU RMSNorm and SwiGLU run at memory speed, and autograd's version makes about twice as many passes
over the activations as are needed. The functions here make fewer; the numbers are the same up to the order
of roundings:

    RMSNorm  y = w * x * r, r = (mean(x^2) + eps)^-1/2       (Zhang & Sennrich 2019, arXiv 1910.07467)
             dx = r * (w g - x r * mean(w g * x r))          dw = sum over tokens of g * x r
    SwiGLU   y = silu(a) * b                                 (Shazeer 2020, arXiv 2002.05202)

A module is changed only where a trial on random numbers, forward and backward, gives what its own forward
gives; variants (Gemma's 1 + w, other activations) keep theirs. So does any call under autocast, in another
dtype, or without fp32 weights. Only the instance's ``forward`` is replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_TRIAL_TOKENS = 5
_TRIAL_TOLERANCE = 1e-4


class _RMSNorm(torch.autograd.Function):
    """x (..., D) -> (..., D), weight (D,); fp32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        squares = torch.linalg.vecdot(x, x).unsqueeze(-1)
        inverse = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        normed: torch.Tensor = x * inverse
        ctx.save_for_backward(normed, inverse, weight_D)
        return normed * weight_D

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x and of the weight."""
        normed, inverse, weight_D = ctx.saved_tensors
        grad_x = grad_D = None
        if ctx.needs_input_grad[1]:
            grad_D = (grad * normed).reshape(-1, grad.shape[-1]).sum(0)
        if ctx.needs_input_grad[0]:
            slope = grad * weight_D
            share = torch.linalg.vecdot(slope, normed).unsqueeze(-1).div_(normed.shape[-1])
            grad_x = slope.addcmul_(normed, share, value=-1).mul_(inverse)
        return grad_x, grad_D, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, both (..., I); fp32."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        active = F.silu(gate)
        ctx.save_for_backward(gate, up, active)
        return active * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of both."""
        gate, up, active = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * active


def lean(model: nn.Module) -> int:
    """Give every module that passes the trial the leaner forward; how many were changed.

    The model is left in eval mode: a trial must not draw dropout.
    """
    model.eval()
    changed = 0
    for module in model.modules():
        forward = _candidate(module)
        if forward is not None and _passes(module, forward):
            module.forward = partial(_guarded, module, forward)
            changed += 1
    return changed


def _candidate(module: nn.Module) -> Callable[[nn.Module, torch.Tensor], torch.Tensor] | None:
    """The leaner forward a module may have, by what it holds."""
    if not all(p.dtype == torch.float32 for p in module.parameters()):
        return None
    children = {name for name, _ in module.named_children()}
    if type(module).__name__.endswith("RMSNorm") and isinstance(getattr(module, "variance_epsilon", None), float):
        return _rms_norm
    if children == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return _swiglu
    return None


def _rms_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = _RMSNorm.apply(x, module.weight, module.variance_epsilon)  # type: ignore[no-untyped-call]
    return out


def _swiglu(module: Any, x: torch.Tensor) -> torch.Tensor:
    middle = _SwiGLU.apply(module.gate_proj(x), module.up_proj(x))  # type: ignore[no-untyped-call]
    out: torch.Tensor = module.down_proj(middle)
    return out


def _guarded(module: nn.Module, forward: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The leaner forward for plain fp32 calls, the module's own for all others."""
    if x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type):
        own: torch.Tensor = type(module).forward(module, x)
        return own
    return forward(module, x)


def _passes(module: nn.Module, forward: Callable[..., torch.Tensor]) -> bool:
    """Whether output and input gradient on random numbers are those of the module's own forward."""
    parameter = next(module.parameters())
    width = parameter.shape[-1]
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(_TRIAL_TOKENS, width, generator=generator).to(parameter.device)
    own, ours = _trial(partial(type(module).forward, module), x_ND), _trial(partial(forward, module), x_ND)
    return all(
        torch.allclose(a, b, rtol=_TRIAL_TOLERANCE, atol=_TRIAL_TOLERANCE) for a, b in zip(own, ours, strict=True)
    )


def _trial(call: Callable[[torch.Tensor], torch.Tensor], x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x_ND.clone().requires_grad_(True)
    with torch.enable_grad():
        out = call(x)
        (grad,) = torch.autograd.grad(out.square().sum(), x)
    return out.detach(), grad
