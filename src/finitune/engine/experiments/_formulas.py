"""The updates of Adam, AdamW and SGD by their formulas, in fp32 and one parameter at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from finitune.engine.conditions import NotPossible

Update = Callable[[torch.nn.Parameter], torch.Tensor]
"""From a parameter with its gradient to the value it should have after the update, fp32."""
Made = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""The new value of a parameter, and of its moments by their names in the optimizer's state; fp32."""
_MOMENTS = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


def formula_of(optimizer: torch.optim.Optimizer) -> Update:
    """The formula of this optimizer. Raises NotPossible where there is none here, or its state cannot be read."""
    whole = whole_formula_of(optimizer)
    return lambda parameter: whole(parameter)[0]


def whole_formula_of(optimizer: torch.optim.Optimizer) -> Callable[[torch.nn.Parameter], Made]:
    """As :func:`formula_of`, with the new moments."""
    name, family = _named(optimizer)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}

    def update(parameter: torch.nn.Parameter) -> Made:
        group, state = groups[id(parameter)], optimizer.state.get(parameter, {})
        moments = [_moment(state, moment, parameter) for moment in _MOMENTS[family]]
        grad = _gradient(parameter, group, optimizer)
        if family == "sgd":
            weight, found = _sgd(parameter, group, grad, moments[0])
        else:
            decoupled = name.startswith("adamw") or bool(group.get("decoupled_weight_decay"))
            weight, found = _adam(parameter, group, grad, moments, _steps(state) + 1, decoupled=decoupled)
        return weight, {n: m for n, m in zip(_MOMENTS[family], found, strict=True) if m is not None}

    return update


def _named(optimizer: torch.optim.Optimizer) -> tuple[str, str]:
    """The name under which the formula is known, of the class or one that it is derived from; and its family."""
    known = (c.__name__.lower() for c in type(optimizer).__mro__ if issubclass(c, torch.optim.Optimizer))
    found = next(((n, f) for n in known for f in _MOMENTS if n.startswith(f)), None)
    if found is None or any(g.get("amsgrad") for g in optimizer.param_groups):
        raise NotPossible(f"there is no plain formula here for {type(optimizer).__name__}")
    return found


def _moment(state: Mapping[str, Any], name: str, parameter: torch.Tensor) -> torch.Tensor | None:
    moment = state.get(name)
    if moment is None:
        if any(isinstance(v, torch.Tensor) and v.numel() > 1 for v in state.values()):
            raise NotPossible(f"the optimizer holds no {name} that can be read")
        return None
    if moment.shape != parameter.shape or not moment.is_floating_point():
        raise NotPossible(f"the optimizer's {name} is stored in a form of its own")
    return torch.as_tensor(moment).float()


def _steps(state: Mapping[str, Any]) -> int:
    return int(state.get("step", 0))


def _gradient(
    parameter: torch.nn.Parameter, group: Mapping[str, Any], optimizer: torch.optim.Optimizer
) -> torch.Tensor:
    """What the optimizer's kernel works with: a fused one divides by ``grad_scale`` itself (loss scale, clipping)."""
    if parameter.grad is None:
        raise NotPossible("a parameter has no gradient")
    grad = parameter.grad.float()
    scale = getattr(optimizer, "grad_scale", None) if getattr(optimizer, "_step_supports_amp_scaling", False) else None
    if isinstance(scale, torch.Tensor):
        grad = grad / scale.to(grad.device).float()
    return -grad if group.get("maximize") else grad


def _adam(
    parameter: torch.nn.Parameter,
    group: Mapping[str, Any],
    grad: torch.Tensor,
    moments: list[torch.Tensor | None],
    step: int,
    *,
    decoupled: bool,
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    beta1, beta2 = (float(b) for b in group["betas"])
    lr, decay = float(group["lr"]), float(group["weight_decay"])
    weight = parameter.detach().float()
    if decoupled:
        weight = weight * (1 - lr * decay)
    elif decay:
        grad = grad + decay * weight
    first = torch.zeros_like(grad) if moments[0] is None else moments[0]
    second = torch.zeros_like(grad) if moments[1] is None else moments[1]
    first = beta1 * first + (1 - beta1) * grad
    second = beta2 * second + (1 - beta2) * grad * grad
    denominator = second.sqrt() / math.sqrt(1 - beta2**step) + float(group["eps"])
    return weight - lr / (1 - beta1**step) * first / denominator, [first, second]


def _sgd(
    parameter: torch.nn.Parameter, group: Mapping[str, Any], grad: torch.Tensor, buffer: torch.Tensor | None
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    weight = parameter.detach().float()
    momentum = float(group.get("momentum", 0.0))
    grad = grad + float(group["weight_decay"]) * weight
    if momentum:
        buffer = grad if buffer is None else momentum * buffer + (1 - float(group["dampening"])) * grad
        grad = grad + momentum * buffer if group.get("nesterov") else buffer
    return weight - float(group["lr"]) * grad, [buffer]
