"""Which module is at work: hooks on every module keep a stack, and the order in which autograd numbers its nodes.

Autograd numbers the nodes of a thread one after the other. So the number at which a module was entered and left tells
which module made a node, whatever the node is: an operation of torch's or a custom ``autograd.Function``.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

OUTSIDE = "(loss)"
"""Where an operation runs that no module of the model makes: the loss closure."""
ROOT = "(model)"
"""Where an operation runs that the model itself makes, outside of its parts."""


class Modules:
    """The modules of a model by name while a step is computed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.micro = 0
        """Number of the micro-batch at hand, from 0."""
        self.backward_seen = False
        """Set by whoever sees backward operations: the next forward is another micro-batch."""
        self._stack: list[str] = []
        self._seqs: list[int] = []
        self._tops: list[str] = []
        self._thread = threading.get_ident()

    @contextmanager
    def watched(self) -> Iterator[Modules]:
        """Inside, the modules at work are known; all hooks are removed afterwards, whatever happens.

        A module without hooks keeps none: code that looks at them (to fuse a layer, say) must compute as ever. It is
        seen by hooks on all modules of the process instead. Those would run before a module's own hooks; a module
        that has some gets two more, around them: what a hook does to an output is that module's doing.
        """
        handles: list[Any] = []
        try:
            bare: dict[nn.Module, str] = {}
            for name, module in self.model.named_modules():
                if module._forward_hooks or module._forward_pre_hooks:
                    first = module.register_forward_pre_hook(self._enter({module: name or ROOT}), prepend=True)
                    last = module.register_forward_hook(self._leave({module: name or ROOT}), always_call=True)
                    handles += [first, last]
                else:
                    bare[module] = name or ROOT
            handles.append(register_module_forward_pre_hook(self._enter(bare)))
            handles.append(register_module_forward_hook(self._leave(bare), always_call=True))
            self._mark()
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._stack.clear()

    def _enter(self, names: Mapping[nn.Module, str]) -> Any:
        def enter(module: nn.Module, _args: Any) -> None:
            name = names.get(module)
            if name is None:
                return
            # A trainer may call a part of the model itself; what is computed again in backward does not count.
            if not self._stack and self.backward_seen and torch._C._current_graph_task_id() == -1:
                self.micro, self.backward_seen = self.micro + 1, False
            self._stack.append(name)
            self._mark()

        return enter

    def _leave(self, names: Mapping[nn.Module, str]) -> Any:
        def leave(module: nn.Module, _args: Any, _output: Any) -> None:
            name = names.get(module)
            if name is None:
                return
            while self._stack and self._stack.pop() != name:
                pass  # an exception passed through modules whose hooks did not run
            self._mark()

        return leave

    def _mark(self) -> None:
        if threading.get_ident() == self._thread:  # numbers are counted per thread
            self._seqs.append(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
            self._tops.append(self.here())

    def here(self) -> str:
        """Dotted name of the innermost module at work; ``(model)`` or ``(loss)`` outside of the parts."""
        return self._stack[-1] if self._stack else OUTSIDE

    @property
    def inside(self) -> bool:
        """A module's forward is running."""
        return bool(self._stack)

    def of_node(self, sequence_nr: int) -> str:
        """The module whose forward made the autograd node of this number."""
        place = bisect_right(self._seqs, sequence_nr) - 1
        return self._tops[place] if place >= 0 else OUTSIDE


def owner_of(parameter: str) -> str:
    """Dotted name of the module that holds a parameter; ``(model)`` for one of the model's own."""
    return parameter.rpartition(".")[0] or ROOT


def is_part(name: str) -> bool:
    """Whether it names a module below the model itself."""
    return name not in (ROOT, OUTSIDE)
