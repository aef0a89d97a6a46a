"""What a guard is given must fit together: checked before the first step, all faults at once."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from finitune.adapters.bare_asked import Loop
from finitune.adapters.bare_half import half_under_scaler, refusal
from finitune.adapters.codes import BAD_ARGUMENT, CLOSURE_OPTIMIZER
from finitune.core.errors import UserError, raise_all
from finitune.engine.capsule import ROWS

POLICIES = ("auto", "safe", "observe")
_WEIGHTS = ("auto", "full", "lora", "digest")


def check(
    loop: Loop,
    policy: str,
    watch: Sequence[str] | None,
    limits: Mapping[str, float],
    memory_share: float,
    capsule: tuple[str, str] = ("full", "auto"),
) -> None:
    """Raise UserError, or UserErrors, for a loop that cannot be guarded."""
    raise_all(
        [
            *_arguments(loop, policy),
            *_optimizer(loop),
            *_scaler(loop, policy),
            *_watch(loop, watch),
            *_limits(limits, memory_share),
            *_capsule(*capsule),
        ]
    )


def _bad(name: str, problem: str, cure: str) -> UserError:
    return UserError(BAD_ARGUMENT, "finitune.guard", name=name, problem=problem, cure=cure)


def _arguments(loop: Loop, policy: str) -> Iterator[UserError]:
    if not isinstance(loop.model, nn.Module):
        yield _bad("model", f"a {type(loop.model).__name__} is no torch.nn.Module", "give the module that is trained")
    if not callable(loop.loss_fn):
        problem = f"a {type(loop.loss_fn).__name__} cannot be called"
        yield _bad("loss_fn", problem, "give a function loss_fn(model, batch) that returns the loss")
    if policy not in POLICIES:
        yield _bad("policy", f"{policy!r} is not known", f"choose one of {', '.join(POLICIES)}")
    limit = loop.max_grad_norm
    if limit is not None and not (limit >= 0 and math.isfinite(limit)):
        yield _bad("max_grad_norm", f"cannot clip to a norm of {limit}", "give a number from 0, or None")
    if loop.scheduler is not None and not _can_step(loop.scheduler):
        name = type(loop.scheduler).__name__
        problem = f"{name}.step() cannot be called after each step without arguments, or has no state_dict()"
        yield _bad("scheduler", problem, "leave scheduler=None and step it yourself, between guard.step calls")


def _limits(limits: Mapping[str, float], memory_share: float) -> Iterator[UserError]:
    for name, value in limits.items():
        if not value >= 0:
            yield _bad(name, f"{value} is less than nothing", "give a number from 0")
    if not 0 <= memory_share <= 1:
        yield _bad("memory_share", f"{memory_share} is no share", "give a number from 0 to 1")


def _capsule(rows: str, weights: str) -> Iterator[UserError]:
    if rows not in ROWS:
        yield _bad("capsule_rows", f"{rows!r} is not known", f"choose one of {', '.join(ROWS)}")
    if weights not in _WEIGHTS:
        problem = f"{weights!r} is not known"
        if weights == "delta":
            problem = "the weights that training began from, which a delta is a difference to, are not kept by a guard"
        yield _bad("capsule_weights", problem, f"choose one of {', '.join(_WEIGHTS)}")


def _can_step(scheduler: Any) -> bool:
    metric = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    return not metric and all(callable(getattr(scheduler, n, None)) for n in ("step", "state_dict", "load_state_dict"))


def _optimizer(loop: Loop) -> Iterator[UserError]:
    optimizer = loop.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        problem = f"a {type(optimizer).__name__} is no torch.optim.Optimizer"
        yield _bad("optimizer", problem, "give the optimizer that updates the model")
        return
    if isinstance(optimizer, torch.optim.LBFGS) or _wants_closure(optimizer):
        yield UserError(CLOSURE_OPTIMIZER, "optimizer", optimizer=type(optimizer).__name__)
    if not isinstance(loop.model, nn.Module):
        return
    held = [p for g in optimizer.param_groups for p in g["params"]]
    if not any(p.requires_grad for p in held):
        yield _bad(
            "optimizer", "none of its parameters has requires_grad=True", "let it hold the weights to be trained"
        )
    meta = [n for n, p in loop.model.named_parameters() if p.device.type == "meta"]
    if meta:
        yield _bad("model", f"{meta[0]} is on the meta device: it has no values", "load the weights first")


def _wants_closure(optimizer: torch.optim.Optimizer) -> bool:
    try:
        closure = inspect.signature(optimizer.step).parameters.get("closure")
    except (TypeError, ValueError):
        return False
    return closure is not None and closure.default is inspect.Parameter.empty


def _scaler(loop: Loop, policy: str) -> Iterator[UserError]:
    scaler = loop.scaler
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        problem = f"a {type(scaler).__name__} is no torch.amp.GradScaler"
        yield _bad("scaler", problem, "use torch.amp.GradScaler, or scaler=None")
    half = half_under_scaler(loop)
    if half and policy == "observe":  # else they are raised to fp32
        yield refusal([name for name, _ in half])


def _watch(loop: Loop, watch: Sequence[str] | None) -> Iterator[UserError]:
    if watch is None or not isinstance(loop.model, nn.Module):
        return
    known = {n for n, _ in loop.model.named_modules()}
    unknown = [n for n in watch if n not in known]
    if unknown:
        yield _bad("watch", f"the model has no module {unknown[0]!r}", "use names of model.named_modules()")
