"""Operations on tensors of the training state, in place: moments that start anew, tensors that are repaired."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from finitune.engine.conditions import NotPossible
from finitune.engine.plan import Mend, Operation
from finitune.engine.port import ReplayPort
from finitune.engine.snapshot import Snapshot


def mend(port: ReplayPort, mends: Sequence[Mend], state_at: Callable[[int], Snapshot | None]) -> None:
    """Carry out operations on the port's present state. Raises NotPossible where a good value cannot be had."""
    for one in mends:
        if one.what is Operation.RESET_MOMENTS:
            reset_moments(port, one.names)
        else:
            repair(port, one, state_at)


def reset_moments(port: ReplayPort, names: Sequence[str]) -> None:
    """The optimizer forgets what it holds of these parameters; its step count with it (bias correction starts anew)."""
    by_name = dict(port.parameters())
    for name in names:
        port.optimizer.state.pop(by_name[name], None)


@torch.no_grad()
def repair(port: ReplayPort, one: Mend, state_at: Callable[[int], Snapshot | None]) -> None:
    """Copy good values over named tensors. Raises NotPossible with nothing changed."""
    targets = {**dict(port.state_tensors()), **_model_tensors(port)}
    snapshot = state_at(one.from_step) if one.from_step is not None else None
    values = {}
    for name in one.names:
        value = snapshot.tensors.get(name) if snapshot is not None else port.origin(name)
        if value is None or name not in targets:
            raise NotPossible(f"no good value of {name} is at hand")
        if value.shape != targets[name].shape or not bool(torch.isfinite(value).all()):
            raise NotPossible(f"the earlier value of {name} is not usable")
        values[name] = value
    for name, value in values.items():
        targets[name].copy_(value)


def _model_tensors(port: ReplayPort) -> dict[str, torch.Tensor]:
    """All weights and buffers of the model, frozen ones too."""
    return {**dict(port.model.named_parameters()), **dict(port.model.named_buffers())}
