"""Whether optimizer, schedule and weights belong together: of the state at hand, and against a fingerprint of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finitune.core.types import Finding
from finitune.engine.look.codes_state import STATE_LOST
from finitune.numerics.norms import tensor_norms

# Skipped steps under a loss scale move a schedule on without an update; a lost state is off by far more.
_FACTOR = 2.0
_SLACK_STEPS = 20
_FEW_STEPS = 2
# Norms are sums in another order on another device.
_CLOSE = 1e-4


def _updates(optimizer: torch.optim.Optimizer) -> int | None:
    """Updates that an optimizer has counted; 0 without any state, None where it counts none."""
    if not optimizer.state:
        return 0
    counts = [s["step"] for s in optimizer.state.values() if isinstance(s, Mapping) and "step" in s]
    return int(max(float(c) for c in counts)) if counts else None


def _keeps_moments(optimizer: torch.optim.Optimizer) -> bool:
    return any("betas" in g or float(g.get("momentum") or 0.0) > 0 for g in optimizer.param_groups)


def _place(scheduler: Any) -> int | None:
    """Steps that a schedule has made."""
    found = getattr(scheduler, "last_epoch", None)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def not_of_one_run(optimizer: torch.optim.Optimizer, scheduler: Any = None) -> list[Finding]:
    """OPT113 where the counts of optimizer and schedule, or the counts and the moments, contradict each other."""
    told = list(_contradictions(optimizer, _updates(optimizer), _place(scheduler)))
    return [STATE_LOST.find("optimizer", differs="; ".join(told), fault_class="U")] if told else []


def _contradictions(optimizer: torch.optim.Optimizer, updates: int | None, place: int | None) -> Iterator[str]:
    if updates is not None and place is not None:
        if updates == 0 and place >= _FEW_STEPS and _keeps_moments(optimizer):
            yield f"scheduler: last_epoch = {place}; optimizer: step = 0"
        elif updates >= _FEW_STEPS and max(place, 1) * _FACTOR + _SLACK_STEPS < updates:
            yield f"scheduler: last_epoch = {place}; optimizer: step = {updates}"
        elif updates >= _FEW_STEPS and place == 0:
            yield f"scheduler: last_epoch = 0; optimizer: step = {updates}"
        elif updates > 0 and updates * _FACTOR + _SLACK_STEPS < place:
            yield f"scheduler: last_epoch = {place}; optimizer: step = {updates}"
    if updates and _is_empty(optimizer):
        yield f"optimizer: step = {updates}, exp_avg_sq = 0"


def _is_empty(optimizer: torch.optim.Optimizer) -> bool:
    """All second moments are 0 although updates were made."""
    second = [s["exp_avg_sq"] for s in optimizer.state.values() if isinstance(s, Mapping) and "exp_avg_sq" in s]
    plain = [t for t in second if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]
    return bool(plain) and float(tensor_norms(plain).abs().max()) == 0.0


# -- a fingerprint ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def fingerprint(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any = None, scaler: Any = None
) -> dict[str, Any]:
    """A short JSON-able record to be saved with a checkpoint: rates, counts, norms of weights and moments, scale."""
    slots: dict[str, list[Tensor]] = {}
    for state in optimizer.state.values():
        for slot, value in state.items() if isinstance(state, Mapping) else ():
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
                slots.setdefault(str(slot), []).append(value)
    trained = [p.detach() for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    return {
        "lr": [float(g["lr"]) for g in optimizer.param_groups],
        "updates": _updates(optimizer),
        "scheduler": _place(scheduler),
        "scale": float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else None,
        "weights": _norm(trained),
        "moments": {slot: _norm(tensors) for slot, tensors in sorted(slots.items())},
    }


def _norm(tensors: list[Tensor]) -> float:
    """L2 norm over all of them, fp32; NaN where one is not finite."""
    if not tensors:
        return 0.0
    norm = float(torch.linalg.vector_norm(tensor_norms(tensors)))
    return norm if math.isfinite(norm) else math.nan


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Finding]:
    """OPT113 where the state is not the one that a fingerprint was taken of. Numbers that one of them lacks are passed.

    A fingerprint that something else wrote raises nothing.
    """
    told = [line for key in ("lr", "updates", "scheduler", "scale", "weights") for line in _told(key, then, now)]
    before, after = then.get("moments"), now.get("moments")
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        told += [line for slot in before for line in _told(slot, before, {slot: after.get(slot, 0.0)})]
    return [STATE_LOST.find("resume", differs="; ".join(told), fault_class="U")] if told else []


def _told(key: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    was, found = then.get(key), now.get(key)
    if was is not None and found is not None and not _same(was, found):
        yield f"{key}: {_shown(was)} -> {_shown(found)}"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=_CLOSE, abs_tol=1e-12) or (math.isnan(a) and math.isnan(b))
    return bool(a == b)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_shown(v) for v in value[:3])
    return f"{value:.6g}" if isinstance(value, float) else str(value)
