"""Islands: modules that compute in fp32 inside a half-precision run.

A pair of hooks around the module's forward. Before it: half-precision regions are switched off
(``numerics/compute.py``), half inputs are widened, and half weights are replaced for the call by widened ones, inside
the graph, so that gradients come back to the real ones. After it, also after an exception: all of that is taken back.
The backward pass of an island is one of fp32 as well, even where it is started inside of a half-precision region:
autocast would round the wide operands of its products to half again, and what is beyond 65504 would be inf after all.
Outputs stay fp32 under autocast, where the operations around cast by themselves; in a model whose weights are half they
get the half dtype again, for the rest of the model could not take fp32 (a number beyond 65504 does not pass then).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from finitune.engine.conditions import NotPossible
from finitune.numerics.casting import HALF_DTYPES
from finitune.numerics.compute import autocast_regions, computed_in, devices, restore_autocast

_Slots = dict[str, Any]

# Where modules keep the function that computes their forward again in backward: transformers' layers, and the wrapper
# of torch.distributed. It calls forward itself, without hooks.
_CHECKPOINT_SLOTS = ("_gradient_checkpointing_func", "checkpoint_fn")


@dataclasses.dataclass(frozen=True, slots=True)
class _Replaced:
    """An entry of a module's dict (of parameters, buffers, attributes), and what stands in its place for the call."""

    slots: _Slots
    key: str
    original: Any
    substitute: Any
    is_buffer: bool = False

    def undo(self) -> None:
        if self.slots.get(self.key) is not self.substitute:  # the module has put another one there
            return
        if self.is_buffer:  # a statistic that the module may have brought up to date in place
            self.original.data.copy_(self.substitute)
        self.slots[self.key] = self.original


class _Region:
    """fp32 for what runs inside: no half regions, and widened weights in the modules of a subtree."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._products = computed_in("fp32")
        self._replaced: list[_Replaced] = []

    def __enter__(self) -> None:
        self._products.__enter__()
        try:
            self._replaced += _widen_weights(self.module)
            self._replaced += _wrap_checkpoints(self.module)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        for replaced in reversed(self._replaced):
            replaced.undo()
        self._products.__exit__(None, None, None)


@dataclasses.dataclass(frozen=True, slots=True)
class Visit:
    """One call of an island that is under way."""

    island: Island
    region: _Region
    back_to: torch.dtype | None
    """Dtype that floating outputs are given back in; None: as they come."""
    mixed: bool
    """It was called inside of a half-precision region, so its backward may be as well."""


class Island:
    """One module in fp32, from construction to :meth:`close`."""

    def __init__(self, module: nn.Module, visits: list[Visit]) -> None:
        """``visits``: one list for all islands of a model; calls that are under way, the innermost last."""
        self.module, self._visits = module, visits
        # As close around the forward as can be: other hooks see the values that the run sees.
        self._handles = [
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            module.register_forward_hook(self._leave, with_kwargs=True, always_call=True, prepend=True),
        ]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        mixed = any(torch.is_autocast_enabled(d) for d in devices())
        visit = Visit(self, _Region(module), None if mixed else _half_of((args, kwargs), module), mixed)
        visit.region.__enter__()
        self._visits.append(visit)
        return mapped(_widened, args), mapped(_widened, kwargs)

    def _leave(self, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self._visits or self._visits[-1].island is not self:  # another hook failed before ours ran
            return None
        visit = self._visits.pop()
        visit.region.__exit__()
        if visit.mixed:
            _backward_in_fp32((args, kwargs), output)
        dtype = visit.back_to
        if dtype is None:
            return None
        return mapped(lambda t: t.to(dtype) if t.dtype == torch.float32 else t, output)


def abandon(visits: list[Visit]) -> bool:
    """Leave calls that never came to their end (a KeyboardInterrupt runs no hooks); True if there were any."""
    found = bool(visits)
    while visits:
        visits.pop().region.__exit__()
    return found


def _backward_in_fp32(inputs: Any, output: Any) -> None:
    """Whatever region the backward pass is started in: the nodes between inputs and output run outside of it."""
    done = set(_nodes(inputs))
    waiting = [n for n in _nodes(output) if n not in done]
    while waiting:
        node = waiting.pop()
        if node in done:
            continue
        done.add(node)
        _without_autocast(node)
        waiting += [following for following, _ in node.next_functions if following is not None]


def _nodes(nest: Any) -> list[Node]:
    """What made the tensors of a nest, as autograd recorded it."""
    found: list[Node] = []

    def look(value: Tensor) -> Tensor:
        if value.grad_fn is not None:
            found.append(value.grad_fn)
        return value

    mapped(look, nest)
    return found


def _without_autocast(node: Node) -> None:
    regions: list[dict[str, tuple[bool, torch.dtype]]] = []

    def before(_gradients: Any) -> None:
        regions.append(autocast_regions())
        for device, (enabled, _) in regions[-1].items():
            if enabled:
                torch.set_autocast_enabled(device, False)

    def after(_made: Any, _gradients: Any) -> None:
        restore_autocast(regions.pop())

    node.register_prehook(before)
    node.register_hook(after)


def check_island(name: str, module: nn.Module) -> None:
    """Raise NotPossible for a module that cannot be made an island."""
    if isinstance(module, torch.jit.ScriptModule):
        raise NotPossible(f"{name} is compiled (TorchScript): nothing can be changed inside of it")
    if not all(p.is_floating_point() or p.is_complex() for p in module.parameters()):
        raise NotPossible(f"the weights of {name} are quantised: they have no fp32 form to compute with")


def _widened(value: Tensor) -> Tensor:
    return value.float() if value.dtype in HALF_DTYPES else value


def _half_of(inputs: Any, module: nn.Module) -> torch.dtype | None:
    """The half dtype that the module's inputs, or else its weights, are in."""
    found: list[torch.dtype] = []

    def look(value: Tensor) -> Tensor:
        found.append(value.dtype)
        return value

    mapped(look, inputs)
    found += [p.dtype for p in module.parameters()]
    return next((d for d in found if d in HALF_DTYPES), None)


def _widen_weights(module: nn.Module) -> list[_Replaced]:
    """Put widened weights and buffers in place of the half ones."""
    wide: dict[int, Tensor] = {}
    replaced = []
    for part in module.modules():
        for slots in (part._parameters, part._buffers):
            for key, value in slots.items():
                if value is None or value.dtype not in HALF_DTYPES:
                    continue
                if id(value) not in wide:
                    wide[id(value)] = value.float()
                replaced.append(_Replaced(slots, key, value, wide[id(value)], slots is part._buffers))
                slots[key] = wide[id(value)]  # type: ignore[assignment]
    return replaced


def _wrap_checkpoints(module: nn.Module) -> list[_Replaced]:
    """Let what is computed again in backward be computed on the island as well: by then the call is long over."""
    replaced = []
    for part in module.modules():
        for key in _CHECKPOINT_SLOTS:
            checkpoint = part.__dict__.get(key)
            if checkpoint is not None:
                wrapped = partial(_checkpoint_inside, checkpoint, part)
                replaced.append(_Replaced(part.__dict__, key, checkpoint, wrapped))
                part.__dict__[key] = wrapped
    return replaced


def _checkpoint_inside(checkpoint: Callable[..., Any], part: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    def inside(*inputs: Any, **named: Any) -> Any:
        with _Region(part):
            return forward(*inputs, **named)

    return checkpoint(inside, *args, **kwargs)


def mapped(change: Callable[[Tensor], Tensor], nest: Any) -> Any:
    """The nest with every tensor changed: dicts, lists, tuples, named tuples, dataclasses and their like.

    A container without a changed tensor is returned as it is, and so is whatever is no container.
    """
    if isinstance(nest, Tensor):
        return change(nest)
    if isinstance(nest, tuple | list):
        return _mapped_sequence(change, nest)
    if isinstance(nest, Mapping):
        items = {k: mapped(change, v) for k, v in nest.items()}
        return nest if _same(items.values(), nest.values()) else _rebuilt(nest, items)
    if dataclasses.is_dataclass(nest) and not isinstance(nest, type):
        values = {f.name: getattr(nest, f.name) for f in dataclasses.fields(nest) if f.init}
        changed = {k: mapped(change, v) for k, v in values.items()}
        return nest if _same(changed.values(), values.values()) else dataclasses.replace(nest, **changed)
    return nest


def _mapped_sequence(change: Callable[[Tensor], Tensor], nest: Any) -> Any:
    values = [mapped(change, v) for v in nest]
    if _same(values, nest):
        return nest
    if hasattr(nest, "_make"):  # a named tuple takes its values one by one
        return nest._make(values)
    return type(nest)(values)


def _rebuilt(nest: Mapping[Any, Any], items: Mapping[Any, Any]) -> Any:
    if type(nest) is dict:
        return dict(items)
    copied = copy.copy(nest)
    for key, value in items.items():
        copied[key] = value  # type: ignore[index]
    return copied


def _same(values: Iterable[Any], others: Iterable[Any]) -> bool:
    return all(a is b for a, b in zip(values, others, strict=True))
