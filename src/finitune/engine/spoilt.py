"""What an undone update had made bad: names, places and values, told before the state is gone.

Going back may mend what was corrupt before the update. What it held is then known from here, and what it should have
held from the state that was computed anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from finitune.core.incident import Safety, Suspect
from finitune.core.types import Finding
from finitune.engine.codes_time import NOT_REPRODUCED
from finitune.engine.conditions import Conditions
from finitune.engine.first_step import bad_mask, bad_value
from finitune.engine.op_numbers import numbers_of_bad, watchable
from finitune.engine.plan import Plan

MAX_PLACES = 4


def places(tensors: Iterable[tuple[str, torch.Tensor]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Where these state tensors are bad, JSON-able: name, index, value, num_bad. Bad moments (``PARAMETER|SLOT``) of a
    spoilt weight come before it: they are what spoilt it.
    """
    known = dict(tensors)
    moments = [n for n in known if n.rpartition("|")[0] in names and n not in names and is_bad(n, known[n])]
    chosen = dict.fromkeys([*moments, *(n for n in names if n in known and watchable(known[n]))])
    return [_place(name, known[name].detach()) for name in list(chosen)[:MAX_PLACES]]


def is_bad(name: str, tensor: torch.Tensor) -> bool:
    """Whether a state tensor holds what it must not."""
    return watchable(tensor) and bad_value(name, tensor.detach())


def _place(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    mask = bad_mask(name, tensor)
    if not bool(mask.any()):  # many large values, whose squares are beyond fp32 together
        mask = tensor.abs() == tensor.abs().amax()
    numbers = numbers_of_bad(tensor, mask)
    return {"name": name, **{k: numbers[k] for k in ("index", "value", "num_bad", "shape") if k in numbers}}


def suspects(found: Any, now: Mapping[str, torch.Tensor]) -> tuple[Suspect, ...]:
    """The tensors that :func:`places` told, as suspects, with the values of the state that was computed anew.

    Args:
        found: what :func:`places` gave; anything else gives nothing.
        now: tensors of the state of before the update, as it should have been.
    """
    told = [p for p in found if isinstance(p, Mapping) and isinstance(p.get("name"), str)] if _is_list(found) else []
    return tuple(_suspect(place, now) for place in told)


def _is_list(found: Any) -> bool:
    return isinstance(found, list | tuple)


def _suspect(place: Mapping[str, Any], now: Mapping[str, torch.Tensor]) -> Suspect:
    name = str(place["name"])
    tensor, index = now.get(name), place.get("index")
    was = float(tensor[tuple(index)]) if tensor is not None and index is not None else None
    kind = "moment" if "|" in name else "parameter"
    data = {**place, "was": was, "what": "undone", "parameter": name.rpartition("|")[0] or name}
    return Suspect(kind, name, data)


def parted_at(reason: Finding) -> int | None:
    """The step from which on a run that was computed anew came out differently; None where it failed otherwise."""
    step = reason.data.get("step")
    return step if reason.code == NOT_REPRODUCED.code and isinstance(step, int) and step > 0 else None


def way_back(parted: int, now: int, conditions: Conditions) -> Plan:
    """Back to the last step that the two lines have in common."""
    to_step = parted - 1
    return Plan(
        "roll_back", Safety.LOSSY, conditions, to_step=to_step, data={"to_step": to_step, "steps": now - to_step}
    )
