"""Scan of the state: weights (frozen ones too), moments and buffers as they are before the failing step.

What it changes: nothing. BAD: a tensor holds NaN or inf, a second moment is negative, or a few values are finite and
beyond any sense (2^40 where all others are below 2^20): the failure was made before this step, and its data is not to
blame. GOOD: all are sound; the step itself makes the bad values.
Cost: one pass over the state (a hundredth of a step); with a bad tensor, a look at a few earlier states.
Source: a running mean of squares cannot be negative (Kingma & Ba 2015, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from finitune.core.incident import Evidence, Result, Suspect, Words
from finitune.engine.case import Case
from finitune.engine.first_step import Since, bad_mask, bad_value, has_bad, since_when
from finitune.engine.lab import Lab
from finitune.engine.op_numbers import is_bad, numbers_of_bad, peak, watchable
from finitune.engine.padding_row import padding_row
from finitune.engine.port import ReplayPort

ORDER = 10
COST = 0.1
SAYS: Mapping[Result, Words] = {
    Result.GOOD: Words(
        "All weights, moments and buffers were finite before the step (largest {largest}).",
        "这一步之前，所有权重、动量和缓冲区都是有限值（最大 {largest}）。",
    ),
    Result.BAD: Words(
        "{num_bad} tensors of the state were bad before the step already, the first of them {first}.",
        "这一步之前，状态中已有 {num_bad} 个张量是坏的，第一个是 {first}。",
    ),
}
_MAX_NAMED = 8
# Each look at an earlier state is paid for like a replay; tensors that went bad together have the same date.
_MAX_DATED = 1


def wanted(case: Case) -> bool:
    """Always: it costs next to nothing and rules the most out."""
    del case
    return True


def run(lab: Lab, case: Case) -> tuple[Evidence, tuple[Suspect, ...]]:
    """Look at every tensor once; date the first bad one."""
    del case
    spent = lab.budget.replays
    bad: dict[str, list[str]] = {"parameter": [], "moment": [], "buffer": []}
    suspects: list[Suspect] = []
    largest = 0.0
    for kind, name, tensor in state_of(lab.port):
        if not is_bad_in(kind, name, tensor):
            largest = max(largest, peak(tensor))
            continue
        bad[kind].append(name)
        if len(suspects) < _MAX_NAMED:
            suspects.append(_suspect(lab, kind, name, tensor, dated=len(suspects) < _MAX_DATED))
    names = [n for kind in bad.values() for n in kind]
    numbers = {f"{kind}s": found[:_MAX_NAMED] for kind, found in bad.items()}
    more = {"largest": largest, "num_bad": len(names), "first": names[0] if names else "-"}
    result = Result.BAD if names else Result.GOOD
    return Evidence("scan_state", result, {**numbers, **more}, lab.budget.replays - spent), tuple(suspects)


def state_of(port: ReplayPort) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(kind, name, tensor) of everything the step computes with: all weights, moments, buffers."""
    weights = dict(port.model.named_parameters())
    everything: list[tuple[str, str, torch.Tensor]] = [("parameter", n, p) for n, p in weights.items()]
    everything += [("moment", n, t) for n, t in port.state_tensors() if n not in weights]
    everything += [("buffer", n, b) for n, b in port.model.named_buffers()]
    yield from ((kind, name, t.detach()) for kind, name, t in everything if watchable(t))


def _suspect(lab: Lab, kind: str, name: str, tensor: torch.Tensor, *, dated: bool) -> Suspect:
    data: dict[str, Any] = {**numbers_of_bad(tensor, bad_mask(name, tensor))}
    data["what"] = {"parameter": "weight"}.get(kind, kind)
    data |= {"frozen": kind == "parameter" and name not in lab.before.tensors, "since_step": None, "since_exact": False}
    padding = padding_row(lab.port, tensor, data.get("rows"), data.get("num_rows")) if kind == "parameter" else None
    data |= {} if padding is None else {"padding_row": padding}
    if dated and name in lab.before.tensors:
        since = since_when(lab, has_bad(name))
        data |= {"since_step": since.step or None, "since_exact": since.exact, "sound_at": since.sound_at}
        data["was"] = _before(lab, name, since, data.get("index"))
    elif name not in lab.before.tensors:
        data |= _against_the_original(lab, kind, name)
    return Suspect(kind, name, data)


def _against_the_original(lab: Lab, kind: str, name: str) -> dict[str, Any]:
    """Whether what no state of the run holds (a frozen weight, a buffer) was sound in the original model."""
    original = lab.port.origin(name)
    if original is None:
        return {}
    bad = is_bad_in(kind, name, original)
    return {"since_exact": True} if bad else {"sound_at": 0}


def is_bad_in(kind: str, name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor of this kind is bad. Buffers may hold the largest numbers there are (masks)."""
    return is_bad(tensor) if kind == "buffer" else bad_value(name, tensor)


def _before(lab: Lab, name: str, since: Since, index: Any) -> float | None:
    """The value at the bad place while it was good; None where that is not known."""
    if not since.exact or since.step == 0 or not isinstance(index, list):
        return None
    snapshot = lab.state_at(since.step - 1)
    tensor = snapshot.tensors.get(name) if snapshot is not None else None
    return None if tensor is None else float(tensor[tuple(index)])
