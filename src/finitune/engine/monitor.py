"""The monitor: what the layers put out, and the one host read that turns a Trace into a Reading.

Forward hooks on decoder layers and on ``down_proj``-like modules (where half precision overflows
first) keep least and greatest value by ``torch.aminmax``: one pass, NaN and inf survive it, and the
magnitude gives the distance to the format's limit. The hooks return None, always: a hook that
returns anything else replaces the module's output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from finitune.core.types import Reading
from finitune.engine.port import Trace
from finitune.numerics.norms import bad_names, total_norm

MAX_NAMED = 8
_HALF_BYTES = 2


class Monitor:
    """Holds the hooks and, during a step, the ranges they saw."""

    def __init__(self, outputs: Sequence[tuple[str, nn.Module]], inputs: Sequence[tuple[str, nn.Module]] = ()) -> None:
        self.active = False
        self._outputs, self._inputs = outputs, inputs
        self.wide: set[str] = set()
        """Names of what was seen in fp32 or fp64: no limit of half precision is near there."""
        self._seen: dict[str, list[torch.Tensor]] = {}
        self._handles: list[Any] = []
        self._attach()

    def _attach(self) -> None:
        self._handles += [m.register_forward_hook(self._output_hook(name)) for name, m in self._outputs]
        self._handles += [m.register_forward_pre_hook(self._input_hook(f"{name}.input")) for name, m in self._inputs]

    def _output_hook(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if self.active:
                self._look(name, output[0] if isinstance(output, tuple) else output)

        return hook

    def _input_hook(self, name: str) -> Any:
        def hook(_module: nn.Module, args: Any) -> None:
            if self.active and args:
                self._look(name, args[0])

        return hook

    def _look(self, name: str, tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel():
            self._seen.setdefault(name, []).extend(torch.aminmax(tensor.detach()))
            if tensor.element_size() > _HALF_BYTES:
                self.wide.add(name)

    def start(self) -> None:
        """Begin a step: forget what was seen, look from now on. After :meth:`close` the hooks come back."""
        if not self._handles:
            self._attach()
        self._seen.clear()
        self.wide = set()
        self.active = True

    def stop(self) -> tuple[list[str], torch.Tensor | None]:
        """End the step: names and ranges_M2 (M, 2) fp32 (least, greatest over all micro-batches)."""
        self.active = False
        names, lists = list(self._seen), list(self._seen.values())
        self._seen.clear()
        return names, _joined(lists) if names else None

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _joined(lists: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """Least and greatest of each list of alternating least and greatest values, (M, 2) fp32.

    One ``stack`` for all of them: dozens of tiny operations would cost more than the looking.
    """
    longest = max(map(len, lists))
    # A module seen less often than others repeats its last pair; minimum and maximum do not mind.
    even = [[*values, *(list(values[-2:]) * longest)][:longest] for values in lists]
    all_MK2 = torch.stack([v.float() for values in even for v in values]).view(len(lists), -1, 2)
    return torch.stack([all_MK2[..., 0].amin(dim=1), all_MK2[..., 1].amax(dim=1)], dim=1)


def read(trace: Trace) -> Reading:
    """One host read: loss, gradient norm and module ranges of a step as plain numbers.

    A second read happens only when the gradients are not finite, to name the parameters.
    """
    parts = [trace.loss_sum.reshape(1).float(), total_norm(trace.norms_P).reshape(1)]
    if trace.ranges_M2 is not None:
        parts.append(trace.ranges_M2.abs().amax(dim=1))
    device = trace.loss_sum.device
    loss_sum, norm, *peaks = torch.cat([p.to(device) for p in parts]).tolist()
    amax = dict(zip(trace.watch_names, peaks, strict=True))
    near = {n: p for n, p in amax.items() if n not in trace.wide_names}
    bad = [] if math.isfinite(norm) else bad_names(trace.parameter_names, trace.norms_P)
    return Reading(
        step=trace.step,
        loss=loss_sum / trace.num_supervised if trace.num_supervised else 0.0,
        grad_norm=norm / (trace.loss_scale or 1.0),
        lr=trace.lr,
        supervised_tokens=trace.num_supervised,
        tokens=trace.num_tokens,
        loss_scale=trace.loss_scale,
        bad_parameters=tuple(bad[:MAX_NAMED]),
        num_bad_parameters=len(bad),
        # In half precision only what is half can overflow; of the rest what is bad already is told.
        amax=amax if trace.half_max is None else near | {n: p for n, p in amax.items() if not math.isfinite(p)},
        headroom_bits=headroom_bits(list(near.values()), trace.half_max),
        **trace.extras,
    )


def headroom_bits(peaks: Sequence[float], half_max: float | None) -> float | None:
    """log2(half_max / largest magnitude): how often the worst module may double before it overflows.

    None outside half precision or where nothing was seen; -inf where a value is already non-finite.
    """
    if half_max is None or not peaks:
        return None
    if not all(math.isfinite(p) for p in peaks):
        return -math.inf
    top = max(peaks)
    return math.log2(half_max / top) if top > 0 else math.inf
