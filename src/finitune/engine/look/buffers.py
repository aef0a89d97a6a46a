"""Buffers that no checkpoint holds, against what their module computes from its configuration.

A module without weights that is built from a configuration alone (a rotary embedding) can be built once more, on the
CPU: its buffers are then what they should be. That asks no formula of ours, so every kind of scaling is right.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from finitune.core.types import Finding
from finitune.engine.look.codes import BUFFER_DIFFERS
from finitune.numerics.seeds import generators_kept

# Another device or a fused kernel may round a power differently; a cast to half keeps 8 or 11 bits.
_TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
_CLOSE = 1e-4
_FOREIGN = (AttributeError, ImportError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What the constructor of a module that takes more than a configuration may raise: it cannot be compared then."""
_FP16_TINY = 6.2e-5
"""Below the smallest normal fp16 number a cast loses bits: no relative comparison holds there."""


def differing(model: nn.Module) -> list[Finding]:
    """MOD112 for each buffer that differs from what its module computes when it is built from its configuration."""
    return [f for name, module, fresh in _fresh(model) for f in _compared(name, module, fresh)]


def rebuilt(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every computed buffer: its name, the tensor itself, and what the configuration gives (on the CPU)."""
    for prefix, module, fresh in _fresh(model):
        for name, buffer in module.named_buffers():
            if name in fresh and buffer.is_floating_point() and not buffer.is_meta:
                yield _path(prefix, name), buffer, fresh[name]


def _fresh(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, Tensor]]]:
    """Modules that hold nothing but computed buffers, and the buffers of one that was built anew."""
    for name, module in model.named_modules():
        fresh = _built_again(module) if _is_computed(module) else None
        if fresh is not None:
            yield name, module, dict(fresh.named_buffers())


def _path(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _is_computed(module: nn.Module) -> bool:
    """Nothing but buffers that are not saved, from a configuration, with no memory of what was computed before."""
    config = getattr(module, "config", None)
    buffers = dict(module.named_buffers())
    moved = getattr(module, "max_seq_len_cached", None) != getattr(module, "original_max_seq_len", None)
    saved = bool(module.state_dict())
    no_weights = next(module.parameters(), None) is None
    return config is not None and bool(buffers) and no_weights and not saved and not moved


def _built_again(module: nn.Module) -> nn.Module | None:
    """A new module of the same kind from the same configuration; None where it takes more than that."""
    kind: Any = type(module)
    try:
        with generators_kept(), torch.device("cpu"):
            made = kind(config=module.config)
    except _FOREIGN:
        return None
    return made if isinstance(made, nn.Module) else None


def _compared(prefix: str, module: nn.Module, fresh: dict[str, Tensor]) -> Iterator[Finding]:
    for name, buffer in module.named_buffers():
        expected = fresh.get(name)
        if expected is None or not buffer.is_floating_point() or buffer.is_meta:
            continue
        path = _path(prefix, name)
        if buffer.shape != expected.shape:
            shapes = {"found": str(tuple(buffer.shape)), "expected": str(tuple(expected.shape))}
            yield _finding(path, module, "", buffer.numel(), buffer.numel(), **shapes)
            continue
        wrong = ~_close(buffer.detach().cpu(), expected)
        if bool(wrong.any()):
            place = int(wrong.reshape(-1).to(torch.uint8).argmax())
            values = {"found": float(buffer.reshape(-1)[place]), "expected": float(expected.reshape(-1)[place])}
            yield _finding(path, module, str(place), int(wrong.sum()), buffer.numel(), **values)


def _close(found: Tensor, expected: Tensor) -> Tensor:
    """Elementwise, up to the rounding of the format that the buffer is in; NaN is never close."""
    relative = _TOLERANCE.get(found.dtype, _CLOSE)
    smallest = _FP16_TINY if found.dtype == torch.float16 else 1e-30
    apart = (found.float() - expected.float()).abs()
    return apart <= relative * expected.float().abs() + relative * smallest + (smallest if relative > _CLOSE else 0.0)


def _finding(path: str, module: nn.Module, index: str, bad: int, total: int, **values: Any) -> Finding:
    kind = type(module).__name__
    return BUFFER_DIFFERS.find(
        path, name=path, module=kind, index=index, bad=bad, total=total, fault_class="H", **values
    )
