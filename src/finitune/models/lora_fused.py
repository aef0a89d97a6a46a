"""A leaner forward and backward for plain LoRA layers in full precision.

PEFT computes ``base(x) + B(A(x)) * s`` as separate operations: three passes over the output in forward and
two more in backward, each at memory speed, in every linear layer. Here the low-rank product is added by the
matrix product itself (``addmm``), and the scale is applied to the (tokens, r) middle, which is small:

    h   = s * x A^T            out    = x W^T + h B^T
    g_h = s * g B              grad_x = g W + g_h A      grad_A = g_h^T x      grad_B = g^T h

The numbers are those of PEFT up to the order of roundings. Whatever is not this plain case (dropout in
training, DoRA, several adapters, autocast, a base in half precision, hooks on the parts) takes PEFT's road.

Shapes: N tokens, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class _Adapted(torch.autograd.Function):
    """Frozen linear layer plus adapter; x (..., I) -> (..., O), all fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        down_rI: torch.Tensor,
        up_Or: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        middle_Nr = torch.mm(x_NI, down_rI.t()).mul_(scale)
        out_NO = F.linear(x_NI, weight_OI, bias_O).addmm_(middle_Nr, up_Or.t())
        ctx.save_for_backward(x_NI, weight_OI, down_rI, up_Or, middle_Nr)
        ctx.scale, ctx.shape = scale, x.shape
        return out_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, A and B; the base is frozen."""
        x_NI, weight_OI, down_rI, up_Or, middle_Nr = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        slope_Nr = torch.mm(grad_NO, up_Or).mul_(ctx.scale)
        grad_x = grad_down_rI = grad_up_Or = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad_NO, weight_OI).addmm_(slope_Nr, down_rI).view(ctx.shape)
        if ctx.needs_input_grad[3]:
            grad_down_rI = torch.mm(slope_Nr.t(), x_NI)
        if ctx.needs_input_grad[4]:
            grad_up_Or = torch.mm(grad_NO.t(), middle_Nr)
        return grad_x, None, None, grad_down_rI, grad_up_Or, None


def fuse(model: nn.Module) -> int:
    """Give every LoRA layer of a PEFT model the lean forward where it applies; the number of layers.

    Nothing but the instance's ``forward`` changes: parameters, saving and merging are PEFT's.
    """
    from peft.tuners.lora.layer import Linear

    layers = [module for module in model.modules() if type(module) is Linear]
    for layer in layers:
        layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
    return len(layers)


def _forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    name = _plain_adapter(layer, x) if not (args or kwargs) else None
    if name is None:
        whole: torch.Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return whole
    base, down, up = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    out: torch.Tensor = _Adapted.apply(  # type: ignore[no-untyped-call]
        x, base.weight, base.bias, down.weight, up.weight, float(layer.scaling[name])
    )
    return out


def _plain_adapter(layer: Any, x: torch.Tensor) -> str | None:
    """The one active adapter, if this call is the plain case; else None."""
    names = layer.active_adapters
    if len(names) != 1 or layer.disable_adapters or layer.merged or torch.is_autocast_enabled(x.device.type):
        return None
    name: str = names[0]
    if name not in layer.lora_A or name in layer.lora_variant:
        return None
    base, down, up = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    dropout = layer.lora_dropout[name]
    plain = (
        type(base) is nn.Linear
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
        and down.bias is None
        and up.bias is None
        and x.dtype == base.weight.dtype == down.weight.dtype == up.weight.dtype == torch.float32
        and (isinstance(dropout, nn.Identity) or not layer.training)
        and not any(_hooked(part) for part in (base, down, up))
    )
    return name if plain else None


def _hooked(module: nn.Module) -> bool:
    """Somebody watches or changes this part; then it must be called as a module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
