"""Operations on tensors of the training state, in place: moments that start anew, tensors that are repaired."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch

from finitune.engine.conditions import NotPossible
from finitune.engine.plan import Mend, Operation
from finitune.engine.port import ReplayPort
from finitune.engine.snapshot import Snapshot

_ROW = re.compile(r"(.+)\[(\d+)\]")


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
    """Copy good values over named tensors. Raises NotPossible with nothing changed.

    ``NAME[ROW]`` is the row of a padding token: nobody reads it, and where it never had a good value it becomes 0.
    """
    targets = {**dict(port.state_tensors()), **_model_tensors(port)}
    snapshot = state_at(one.from_step) if one.from_step is not None else None
    values = []
    for whole in one.names:
        name, row = split_row(whole) if whole not in targets else (whole, None)
        if name not in targets:
            raise NotPossible(f"there is no tensor {name}")
        target = targets[name] if row is None else targets[name][row]
        values.append((target, _good_value(_earlier(port, name, snapshot), name, row, target)))
    for target, value in values:
        target.copy_(value)


def split_row(name: str) -> tuple[str, int | None]:
    """``NAME[7]`` as name and row; a name without a row has none."""
    found = _ROW.fullmatch(name)
    return (found[1], int(found[2])) if found else (name, None)


def _earlier(port: ReplayPort, name: str, snapshot: Snapshot | None) -> torch.Tensor | None:
    return snapshot.tensors.get(name) if snapshot is not None else port.origin(name)


def _good_value(value: torch.Tensor | None, name: str, row: int | None, target: torch.Tensor) -> torch.Tensor:
    if row is not None:
        known = value[row] if value is not None and row < len(value) else None
        fits = known is not None and known.shape == target.shape and bool(torch.isfinite(known).all())
        return known if known is not None and fits else torch.zeros_like(target)
    if value is None:
        raise NotPossible(f"no good value of {name} is at hand")
    if value.shape != target.shape or not bool(torch.isfinite(value).all()):
        raise NotPossible(f"the earlier value of {name} is not usable")
    return value


def _model_tensors(port: ReplayPort) -> dict[str, torch.Tensor]:
    """All weights and buffers of the model, frozen ones too."""
    return {**dict(port.model.named_parameters()), **dict(port.model.named_buffers())}
