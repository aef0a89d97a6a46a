"""Backward: the frontier between finite and bad gradients, and the node whose backward made the first bad one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from finitune.core.incident import Suspect
from finitune.engine.localise_forward import Layout, suspects_of_origin
from finitune.engine.localise_modules import OUTSIDE, Modules, is_part, owner_of
from finitune.engine.op_numbers import is_bad, numbers_of_bad, watchable
from finitune.engine.op_trace import OpTrace, Origin

_HOOK = "gradient hook"


@dataclass(slots=True)
class Gradients:
    """The parameters in the order in which backward reached them."""

    parameters: Sequence[tuple[str, nn.Parameter]]
    order: list[str] = field(default_factory=list)
    """Of the micro-batch at hand, and after the first bad one of that."""
    bad: dict[str, int] = field(default_factory=dict)
    """Parameters whose gradient became bad, in order, with their micro-batch."""
    _micro: int = -1

    @contextmanager
    def watched(self, trace: OpTrace, modules: Modules) -> Iterator[Gradients]:
        """Inside, every finished gradient is looked at; the hooks are removed afterwards."""
        handles: list[Any] = []
        try:
            for name, parameter in self.parameters:
                if parameter.requires_grad and parameter.is_leaf:
                    handles.append(parameter.register_post_accumulate_grad_hook(self._hook(name, trace, modules)))
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, trace: OpTrace, modules: Modules) -> Any:
        def look(parameter: torch.Tensor) -> None:
            trace.paused = True
            try:
                self._reached(name, parameter.grad, modules.micro)
            finally:
                trace.paused = False

        return look

    def _reached(self, name: str, gradient: torch.Tensor | None, micro: int) -> None:
        if micro != self._micro and not self.bad:
            self._micro, self.order = micro, []
        if micro == self._micro:
            self.order.append(name)
        if name not in self.bad and gradient is not None and watchable(gradient) and is_bad(gradient):
            self.bad[name] = micro

    def finish(self) -> None:
        """Look at the gradients once more: what no hook saw (gradients set by hand) counts as well."""
        for name, parameter in reversed(self.parameters):
            gradient = parameter.grad
            if name not in self.bad and gradient is not None and watchable(gradient) and is_bad(gradient):
                self.bad[name] = max(self._micro, 0)

    def frontier(self) -> tuple[str | None, str | None]:
        """(the last parameter before it whose gradient is finite, the first bad one), in backward order."""
        first = next(iter(self.bad), None)
        before = self.order[: self.order.index(first)] if first in self.order else []
        return (before[-1] if before else None), first


def backward_suspects(
    gradients: Gradients, trace: OpTrace, layouts: Sequence[Layout], model: nn.Module
) -> list[Suspect]:
    """Suspects of bad gradients under a finite loss; empty where all gradients are finite."""
    last_good, first = gradients.frontier()
    if first is None:
        return []
    gradient = dict(gradients.parameters)[first].grad
    assert gradient is not None
    origin = next(iter(trace.origins_of(gradient)), None)
    if origin is not None:
        named = suspects_of_origin(_placed(origin, first), layouts, model)
    else:
        named = _owner(first, gradients.bad[first])
    data = {**numbers_of_bad(gradient), "what": "gradient", "phase": "backward", "micro": gradients.bad[first]}
    data |= {"last_good": last_good, "num_bad_parameters": len(gradients.bad), "module": owner_of(first)}
    data |= {"num_parameters": len(gradients.parameters), "others": list(gradients.bad)[1:8]}
    return [*named, Suspect("parameter", first, data)]


def _placed(origin: Origin, first: str) -> Origin:
    """What a hook on a gradient does has no node in the graph: the parameter at the frontier tells the module."""
    hook = origin.backward and origin.kind == "op" and origin.module == OUTSIDE
    if hook and (not origin.node or "AccumulateGrad" in origin.node):
        origin.module, origin.node = owner_of(first), _HOOK
    return origin


def _owner(parameter: str, micro: int) -> list[Suspect]:
    """The module that holds the parameter at the frontier: all that can be named without an operation."""
    module = owner_of(parameter)
    data = {"phase": "backward", "micro": micro, "parameter": parameter}
    return [Suspect("module", module, data)] if is_part(module) else []
