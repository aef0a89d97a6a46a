"""The pieces of a bare step: the loss that a user's function gives, norms, clipping, rates, and what a model hides."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finitune.adapters.codes import LOSS_UNUSABLE, SPARSE_GRADIENT
from finitune.core import registry
from finitune.core.errors import UserError
from finitune.core.types import Reading
from finitune.engine.conditions import AS_CONFIGURED, Conditions
from finitune.engine.realise import learning_rate
from finitune.numerics.fingerprint import checksum
from finitune.numerics.norms import tensor_norms

# A sum over the batch that batch norm keeps is part of the training state, and every forward in training moves it.
_MOVING = ("running_mean", "running_var", "num_batches_tracked")
_CLIP_EPS = 1e-6
"""torch.nn.utils.clip_grad_norm_ multiplies by min(1, max_norm / (norm + 1e-6))."""
_SURELY = 1.001
"""Sums in another order, or with the loss scale in them, differ by far less."""


def loss_of(given: Any, micro: int) -> Tensor:
    """The loss in what a loss function returned, (). Raises UserError SYS420."""
    loss = given if isinstance(given, Tensor) else getattr(given, "loss", None)
    if loss is None and isinstance(given, Mapping):
        loss = given.get("loss")
    if not isinstance(loss, Tensor):
        raise UserError(LOSS_UNUSABLE, micro=micro, problem=f"loss_fn returned a {type(given).__name__} without a loss")
    if loss.numel() != 1 or not loss.is_floating_point():
        problem = f"the loss has shape {tuple(loss.shape)}, {loss.numel()} numbers of {loss.dtype}"
        raise UserError(LOSS_UNUSABLE, micro=micro, problem=problem)
    if not loss.requires_grad:
        raise UserError(LOSS_UNUSABLE, micro=micro, problem="the loss has no gradient: it depends on no trained weight")
    return loss.reshape(())


# -- gradients -----------------------------------------------------------------------------------------------------


def refuse_sparse(parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Raise UserError SYS422 for a sparse gradient: norms, clipping and moments are those of dense ones."""
    for name, parameter in parameters:
        if parameter.grad is not None and parameter.grad.layout is not torch.strided:
            raise UserError(SPARSE_GRADIENT, name, name=name)


@torch.no_grad()
def clip_to(gradients: Sequence[nn.Parameter], norms_P: Tensor | None, max_norm: float, norm: float = math.inf) -> None:
    """Clip as ``torch.nn.utils.clip_grad_norm_`` does, to the bit.

    Args:
        gradients: parameters with a gradient, in the model's order.
        norms_P: norms that are known already (P,); None: the gradients have been changed since.
        max_norm: limit.
        norm: of all of them as the host has read it, the loss scale divided out. Well under the limit the factor is
            clamped to exactly 1, and there is nothing to be multiplied.
    """
    grads = [p.grad for p in gradients if p.grad is not None]
    plain = all(g.dtype == torch.float32 and g.device == grads[0].device for g in grads)
    if plain and norm * _SURELY + _CLIP_EPS < max_norm:
        return
    if norms_P is None or not plain:
        torch.nn.utils.clip_grad_norm_(gradients, max_norm)
        return
    torch.nn.utils.clip_grads_with_norm_(gradients, max_norm, torch.linalg.vector_norm(norms_P))


@torch.no_grad()
def clip_adaptively(
    name: str, memory: Mapping[str, Any], max_norm: float | None, reading: Reading, parameters: Sequence[nn.Parameter]
) -> dict[str, Any]:
    """Multiply the gradients (loss scale gone) by what a clipper of ``engine/clippers`` says; what it remembers now."""
    clipper = registry.load("clippers", name).Clipper(max_norm)
    if memory.get("name") == name:
        clipper.load(memory["state"])
    there = [p.grad for p in parameters if p.grad is not None]
    norms = iter(tensor_norms(there).tolist())
    factors = clipper.factor(reading.grad_norm, [0.0 if p.grad is None else next(norms) for p in parameters])
    each = [factors] * len(parameters) if isinstance(factors, float) else factors
    for parameter, factor in zip(parameters, each, strict=True):
        if parameter.grad is not None and factor != 1.0:
            parameter.grad.mul_(factor)
    return {"name": name, "state": clipper.state()}


# -- learning rate -------------------------------------------------------------------------------------------------


@contextmanager
def rates_under(optimizer: torch.optim.Optimizer, updates: int, conditions: Conditions) -> Iterator[None]:
    """Inside, every group has the rate that the conditions ask for; afterwards the schedule's own, bit for bit."""
    as_set = conditions.lr_factor == 1.0 and conditions.max_lr is None and conditions.warmup_from_update is None
    if conditions is AS_CONFIGURED or as_set:
        yield
        return
    groups = optimizer.param_groups
    was = [g["lr"].clone() if isinstance(g["lr"], Tensor) else g["lr"] for g in groups]
    for group, rate in zip(groups, was, strict=True):
        set_rate(group, learning_rate(float(rate), updates, conditions, float(was[0])))
    try:
        yield
    finally:
        for group, rate in zip(groups, was, strict=True):
            set_rate(group, rate)


def set_rate(group: dict[str, Any], rate: Any) -> None:
    """Set the rate of one group; a tensor keeps its place."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


# -- what computing a loss does to a model -------------------------------------------------------------------------


def moving_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Running statistics that the forward pass itself moves: part of the training state."""
    return [(n, b) for n, b in model.named_buffers() if n.rpartition(".")[2] in _MOVING]


class SideEffects:
    """Sees whether computing a loss changes weights or buffers.

    Changes in place are counted by the tensors themselves; what goes around the count (``.data``) is found by
    checksums, of which the first replay is asked.
    """

    def __init__(self, model: nn.Module, *, buffers: bool = True) -> None:
        """``buffers`` False: they are left out; DistributedDataParallel writes them anew before every forward."""
        moving = {id(b) for _, b in moving_buffers(model)}
        named = [*model.named_parameters(), *(model.named_buffers() if buffers else ())]
        self._tensors = [(n, t) for n, t in named if id(t) not in moving and not t.is_inference()]
        self._checked = False

    def counts(self) -> list[int]:
        """Changes in place so far."""
        return [t._version for _, t in self._tensors]

    def changed_since(self, counts: Sequence[int]) -> list[str]:
        """Names of the tensors that were changed in place since."""
        return [n for (n, t), was in zip(self._tensors, counts, strict=True) if t._version != was]

    def sums_once(self) -> list[int] | None:
        """Checksums of all tensors, the first time; None from then on."""
        if self._checked:
            return None
        self._checked = True
        return [checksum(t) for _, t in self._tensors]

    def differing(self, sums: Sequence[int]) -> list[str]:
        """Names of the tensors with other bits than then."""
        return [n for (n, t), was in zip(self._tensors, sums, strict=True) if checksum(t) != was]


# -- which modules to look at --------------------------------------------------------------------------------------

_WRITERS = ("down_proj", "fc2", "w2", "dense_4h_to_h")


def watched(model: nn.Module, watch: Sequence[str] | None) -> list[tuple[str, nn.Module]]:
    """The modules that the monitor looks at: those named, or layers and the writers into the residual stream.

    Layers are the members of module lists. Writers go by their names (``down_proj``, ``mlp.c_proj``, ``fc2``, ...).
    Raises KeyError for a name that the model does not have.
    """
    modules = dict(model.named_modules())
    if watch is not None:
        return [(name, modules[name]) for name in watch]
    lists = [n for n, m in modules.items() if isinstance(m, nn.ModuleList)]
    layers = {f"{n}.{i}" for n in lists for i in range(len(modules[n]))}
    return [(n, m) for n, m in modules.items() if n in layers or is_writer(n)]


def is_writer(name: str) -> bool:
    """Whether a module of this name writes what an MLP computed into the residual stream."""
    last = name.rpartition(".")[2]
    return last.endswith(_WRITERS) or name.endswith("mlp.c_proj")
