"""The optimizer, and the one place where it is allowed to act.

Clipping and un-scaling are folded into a single factor on the gradients. Fused optimizers apply it
inside their own kernel (``grad_scale``, the hook that ``torch.amp.GradScaler`` uses); for the others
the gradients are multiplied once. The factor is finite and positive by construction: the step was
judged before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

# Weight decay is for matrices; norms and biases are left alone (Loshchilov & Hutter's setting as
# practised since GPT-2).
_DECAYED_DIMENSIONS = 2
# Adam counts its steps in an fp32 number of its own for each parameter.
_STEP_SLOT = "step"


@dataclass(frozen=True, slots=True)
class OptimSettings:
    """What the optimizer is made of."""

    name: str = "adamw_torch_fused"
    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0


def build(parameters: Sequence[tuple[str, nn.Parameter]], settings: OptimSettings) -> torch.optim.Optimizer:
    """Two groups (decayed, not decayed); empty groups are left out."""
    decayed = [p for _, p in parameters if p.dim() >= _DECAYED_DIMENSIONS]
    plain = [p for _, p in parameters if p.dim() < _DECAYED_DIMENSIONS]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decayed, settings.weight_decay), (plain, 0.0))
        if params
    ]
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.betas[0], fused=True)
    fused = settings.name == "adamw_torch_fused"
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=fused)


def clip_factor(grad_norm: float, max_grad_norm: float | None) -> float:
    """What un-scaled gradients are multiplied by: min(1, max_norm / (norm + 1e-6)), as torch clips.

    ``grad_norm`` must be finite; raises ValueError otherwise, since a product could not undo it.
    """
    if not math.isfinite(grad_norm):
        raise ValueError(f"cannot clip by a gradient norm of {grad_norm}")
    if not max_grad_norm:
        return 1.0
    return min(1.0, max_grad_norm / (grad_norm + 1e-6))


def apply(optimizer: torch.optim.Optimizer, *, lr: float, factor: float) -> None:
    """One update at ``lr`` with all gradients multiplied by ``factor``; drops the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    gradients = [p.grad for p in parameters_of(optimizer) if p.grad is not None]
    if factor != 1.0 and gradients:
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            # The fused kernels divide by grad_scale: one pass over the gradients less.
            optimizer.grad_scale = torch.full((), 1.0 / factor, dtype=torch.float32, device=gradients[0].device)  # type: ignore[attr-defined]
            optimizer.found_inf = torch.zeros((), dtype=torch.float32, device=gradients[0].device)  # type: ignore[attr-defined]
        else:
            torch._foreach_mul_(gradients, factor)
    try:
        optimizer.step()
    finally:
        for name in ("grad_scale", "found_inf"):
            if hasattr(optimizer, name):
                delattr(optimizer, name)
        optimizer.zero_grad(set_to_none=True)


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """All parameters the optimizer holds, in order."""
    for group in optimizer.param_groups:
        yield from group["params"]


def moments(
    optimizer: torch.optim.Optimizer, parameters: Sequence[tuple[str, nn.Parameter]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Optimizer state as named tensors: ``<parameter>|<slot>`` (exp_avg, exp_avg_sq, step, ...)."""
    for name, parameter in parameters:
        for slot, value in sorted(optimizer.state.get(parameter, {}).items()):
            if isinstance(value, torch.Tensor):
                yield f"{name}|{slot}", value


def check_moments(parameters: Sequence[tuple[str, nn.Parameter]], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise KeyError where a moment is of no trainable parameter, ValueError where shape or dtype
    cannot be its own.
    """
    by_name = dict(parameters)
    for key, value in tensors.items():
        name, _, slot = key.rpartition("|")
        parameter = by_name[name]
        shape, dtype = ((), torch.float32) if slot == _STEP_SLOT else (tuple(parameter.shape), parameter.dtype)
        if (tuple(value.shape), value.dtype) != (shape, dtype):
            raise ValueError(f"{key} is {value.dtype} {tuple(value.shape)}, expected {dtype} {shape}")


@torch.no_grad()
def restore_moments(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[tuple[str, nn.Parameter]],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Inverse of :func:`moments`: afterwards the optimizer holds these moments and no others.

    Tensors that it holds already are overwritten in place. Raises KeyError where one belongs to no trainable parameter.
    """
    held = dict(moments(optimizer, parameters))
    kept = [key for key in tensors if key in held]
    if kept:
        torch._foreach_copy_([held[key] for key in kept], [tensors[key] for key in kept])
    by_name = dict(parameters)
    for key in held.keys() - tensors.keys():
        name, _, slot = key.rpartition("|")
        del optimizer.state[by_name[name]][slot]
    for key in tensors.keys() - held.keys():
        name, _, slot = key.rpartition("|")
        parameter = by_name[name]
        # A fused kernel keeps its step count beside the weights, the others keep it on the host.
        device = parameter.device if tensors[key].dim() or _fused(optimizer) else torch.device("cpu")
        optimizer.state[parameter][slot] = tensors[key].to(device, copy=True)
    for empty in [p for p, slots in optimizer.state.items() if not slots]:
        del optimizer.state[empty]


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return any(group.get("fused") for group in optimizer.param_groups)
