"""The monitor of a bare loop's model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from finitune.adapters.bare_compute import is_writer, watched
from finitune.engine.monitor import Monitor

_MOST_WATCHED = 200


def monitor_of(model: nn.Module, watch: Sequence[str] | None) -> Monitor | None:
    """None where nothing is watched, or where hooks would break compiled code apart."""
    if is_compiled(model):
        return None
    modules = watched(model, watch)
    inputs = [(n, m) for n, m in modules if is_writer(n)]
    return Monitor(modules[:_MOST_WATCHED], inputs[:_MOST_WATCHED]) if modules else None


def is_compiled(model: nn.Module) -> bool:
    """Whether any part of it was compiled."""
    return any(type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None for m in model.modules())
