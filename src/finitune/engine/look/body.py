"""A frozen body that adds nothing: what leaves its last layer is what entered the first.

Every layer of a transformer adds to a residual stream; over a whole pretrained body the stream grows many times. If
the frozen layers come with another scale (or with zeros) the norm behind them hides it: the model then sees no more
than its embeddings, the loss is finite, and training adapters on it cannot make up for what is missing. A body that is
itself trained may begin like that on purpose, and is not judged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finitune.core.types import Finding
from finitune.engine.look.codes import DEAD_BODY

NOTHING = 0.1
"""Of what entered, as norms. One fresh layer of the usual initialisation adds more than this by itself (0.3 at a width
of 32 and a deviation of 0.02, and more the wider it is), and one that was trained half of what entered and more."""
_ROWS = 256


@dataclass(slots=True)
class _Body:
    """One stack of layers and what was seen of it."""

    name: str
    layers: nn.ModuleList
    entered: Tensor | None = None
    added: Tensor | None = None
    """() fp32: the norm of the change over the norm of what entered."""


class Bodies:
    """The frozen stacks of layers of one model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._bodies = [_Body(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and _is_frozen(m)]

    def hooks(self) -> Iterator[Any]:
        """Handles of what looks at the first computation."""
        for body in self._bodies:
            yield body.layers[0].register_forward_pre_hook(_entering(body), with_kwargs=True)
            yield body.layers[-1].register_forward_hook(_leaving(body))

    def findings(self) -> list[Finding]:
        """MOD118 for each that adds next to nothing, at the weight that lets the least through."""
        return [f for body in self._bodies if (f := self._judged(body)) is not None]

    def _judged(self, body: _Body) -> Finding | None:
        added = float(body.added) if body.added is not None else math.nan
        if not added < NOTHING:
            return None
        name, gain = min(_gains(body), key=lambda found: found[1])
        numbers: dict[str, Any] = {"percent": 100 * added, "count": len(body.layers), "gain": gain}
        return DEAD_BODY.find(name, body=body.name, name=name, fault_class="H", **numbers)


def _is_frozen(layers: nn.ModuleList) -> bool:
    """Layers of one kind, whose matrices are frozen but for adapters between them."""
    if len({type(m) for m in layers}) != 1:
        return False
    sizes = {True: 0, False: 0}
    for parameter in layers.parameters():
        sizes[parameter.requires_grad] += parameter.numel() if parameter.dim() > 1 else 0
    return sizes[False] > sizes[True]


def _gains(body: _Body) -> Iterator[tuple[str, float]]:
    """Frozen matrices by name, with about how much each multiplies a vector by: root mean square times root of width.

    4-bit and 8-bit weights have no such numbers of their own.
    """
    for name, parameter in body.layers.named_parameters():
        if parameter.dim() > 1 and not parameter.requires_grad:
            floating = parameter.is_floating_point()
            rms = float(parameter.detach().float().square().mean().sqrt()) if floating else math.inf
            yield f"{body.name}.{name}", rms * math.sqrt(parameter.shape[-1])


def _sample(tensor: Tensor) -> Tensor:
    """A copy of some rows, fp32: layers may write over their input."""
    return tensor.detach().reshape(-1, tensor.shape[-1])[:_ROWS].float().clone()


def _hidden(args: Any, kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states")


def _entering(body: _Body) -> Any:
    @torch.no_grad()
    def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = _hidden(args, kwargs)
        if body.added is None and isinstance(hidden, Tensor) and hidden.is_floating_point() and hidden.dim() > 1:
            body.entered = _sample(hidden)

    return hook


def _leaving(body: _Body) -> Any:
    @torch.no_grad()
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        left = output[0] if isinstance(output, tuple | list) and output else output
        entered, body.entered = body.entered, None
        if entered is None or not isinstance(left, Tensor) or left.shape[-1:] != entered.shape[-1:]:
            return
        after = _sample(left)
        if after.shape == entered.shape and after.device == entered.device:
            body.added = torch.linalg.vector_norm(after - entered) / torch.linalg.vector_norm(entered)

    return hook
