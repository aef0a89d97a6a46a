"""Does a step repeat? The same step is computed twice on the present state, and every bit is compared.

Replay, redo and resume rest on a step being a function of the state, the rows and the counters. Whether it is one
depends on the model's code and on the device's kernels, so it is tried rather than believed. Bits are compared, not
values: a NaN equals the same NaN, and -0.0 differs from 0.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from finitune.core.types import Finding
from finitune.engine.port import Capability, Port, Trace
from finitune.numerics.codes_determinism import NOT_REPEATED
from finitune.numerics.fingerprint import checksum
from finitune.numerics.seeds import generators_kept


@dataclass(frozen=True, slots=True)
class _Look:
    """What one computation of a step came to."""

    step: int
    loss: float
    """Mean loss over the supervised tokens; shown, not compared."""
    loss_bits: int
    gradients: Mapping[str, tuple[int, ...]]
    """In model order: the bits of each gradient's norm, and the checksum of the gradient where the port shows it."""
    outputs: Mapping[str, tuple[int, ...]]
    """In the order of the forward pass: the bits of the ranges that the monitor saw."""


def repeats(port: Port) -> Finding | None:
    """Compute the step at hand twice; NUM110 where the two differ in any bit, None where they do not.

    The training state and the global generators are as before. Costs two steps without update, and a pass over the
    gradients at several GB/s (on an accelerator, their way to the host). Raises ValueError for a port that cannot
    compute a step twice, and whatever the computation itself raises.
    """
    if Capability.REPLAY not in port.capabilities():
        raise ValueError("a port without Capability.REPLAY cannot compute a step twice")
    with generators_kept():
        first, second = _look(port), _look(port)
    gradients = _differing(first.gradients, second.gradients)
    outputs = _differing(first.outputs, second.outputs)
    if first.loss_bits == second.loss_bits and not gradients and not outputs:
        return None
    return _finding(first, second, gradients, outputs)


def _look(port: Port) -> _Look:
    try:
        trace = port.forward_backward()
        return _Look(
            step=trace.step,
            loss=float(trace.loss_sum) / max(1, trace.num_supervised),
            loss_bits=checksum(trace.loss_sum),
            gradients=_gradients(port, trace),
            outputs=_rows(trace.watch_names, trace.ranges_M2),
        )
    finally:
        port.abort()


def _gradients(port: Port, trace: Trace) -> dict[str, tuple[int, ...]]:
    """The norms are there on every port; the gradients where its state tensors are the parameters themselves."""
    found = _rows(trace.parameter_names, trace.norms_P)
    for name, tensor in port.state_tensors():
        if tensor.is_leaf and tensor.grad is not None:
            found[name] = (*found.get(name, ()), checksum(tensor.grad))
    return found


def _rows(names: Sequence[str], values: torch.Tensor | None) -> dict[str, tuple[int, ...]]:
    """The bits of each row of ``values`` (fp32, one row or number a name) by its name."""
    if values is None or not names:
        return {}
    bits = values.detach().float().cpu().contiguous().view(torch.int32).reshape(len(names), -1)
    return dict(zip(names, map(tuple, bits.tolist()), strict=True))


def _differing(first: Mapping[str, tuple[int, ...]], second: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names whose values differ, or that only one of the two has; in the order of the first."""
    names = [*first, *(n for n in second if n not in first)]
    return [n for n in names if first.get(n) != second.get(n)]


def _finding(first: _Look, second: _Look, gradients: list[str], outputs: list[str]) -> Finding:
    what = (gradients or outputs or ["loss"])[0]
    return NOT_REPEATED.find(
        f"step {first.step}: {what}",
        step=first.step,
        was=repr(first.loss),
        now=repr(second.loss),
        num=len(gradients),
        total=len(first.gradients.keys() | second.gradients.keys()),
        first=gradients[0] if gradients else "-",
        last=gradients[-1] if gradients else "-",
        module=outputs[0] if outputs else "-",
    )
