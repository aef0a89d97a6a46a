"""The state of a guard that a script saves next to model, optimizer, scheduler and scaler.

A dict of tensors, nothing else, so that every way to save one will do (``torch.save`` and ``weights_only=True``,
safetensors, distributed checkpoints):

    guard         a JSON record as bytes (uint8): counters, statistics, conditions, memory of incidents, generators
    batch/...     the newest batches; past/NAME: a snapshot of before (in full histories)
    state/NAME    weights and moments that a cure computes in another dtype than the model was built in: a model or
                  optimizer that is built anew could not hold them
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from finitune.adapters.bare_generators import FAULTS, unpack
from finitune.adapters.bare_held import Held
from finitune.adapters.bare_past import BATCH, PAST, unpacked_batches
from finitune.adapters.bare_record import BareState, conditions_of
from finitune.adapters.codes_script import BAD_GUARD_STATE
from finitune.core.chain import encode
from finitune.core.errors import UserError
from finitune.core.incident import Incident
from finitune.engine.capsule_read import decoded
from finitune.engine.conditions import Conditions
from finitune.numerics.seeds import GeneratorStates

SCHEMA = 1
RECORD = "guard"
STATE = "state/"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Saved:
    """A saved state, checked."""

    record: dict[str, Any]
    """As :meth:`BarePort.state_record` gave it."""
    conditions: Conditions
    mark: Mapping[str, Any]
    """Fingerprint of weights, moments and record."""
    next_row: int
    eps: tuple[float | None, ...]
    """As configured, by parameter group."""
    seen: frozenset[str]
    """Half-precision regions that the loss function was seen to enter."""
    replayable: bool
    bad_from_start: frozenset[str]
    incidents: tuple[Incident, ...]
    generators: GeneratorStates
    batches: tuple[Held, ...]
    """Those of before, oldest first, as plain nests."""
    base: Mapping[str, Any] | None
    """Record of a snapshot of before."""
    line: tuple[Mapping[str, Any], ...]
    """Journal records since that snapshot."""
    tensors: Mapping[str, Tensor]
    """Weights and moments in another dtype."""
    past: Mapping[str, Tensor]
    """Of the snapshot."""


def to_tensors(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state as a dict of tensors; they are references, as in every ``state_dict`` of torch."""
    text = json.dumps(encode({"schema": SCHEMA, **record}), allow_nan=False).encode("utf-8", "backslashreplace")
    packed = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return {RECORD: packed, **{n: t.detach() for n, t in tensors.items()}}


def parse(state: Any) -> Saved:
    """A saved state, every value of the type that it has to be. Raises UserError SYS430."""
    if not isinstance(state, Mapping):
        raise bad(f"a {type(state).__name__} is no dict of tensors")
    strange = [n for n, t in state.items() if not isinstance(n, str) or not isinstance(t, Tensor)]
    if strange or RECORD not in state:
        raise bad(f"the tensor {RECORD!r} is missing" if not strange else f"{str(strange[0])[:60]!r} is no tensor")
    foreign = [n for n in state if n != RECORD and not n.startswith((STATE, BATCH, PAST))]
    if foreign:
        raise bad(f"{foreign[0][:60]!r} is no part of a guard's state")
    return _typed(_json(state[RECORD]), state)


def bad(problem: str) -> UserError:
    """The error for a state that cannot be taken over."""
    return UserError(BAD_GUARD_STATE, "guard.load_state_dict", problem=problem)


def _json(packed: Tensor) -> dict[str, Any]:
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise bad(f"{RECORD!r} is {packed.dtype} of shape {tuple(packed.shape)}, and not bytes")
    try:
        found = json.loads(packed.cpu().numpy().tobytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise bad(f"its record is damaged ({type(error).__name__})") from error
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise bad(f"its schema is {str(schema)[:40]}, and this version knows {SCHEMA}")
    return dict(found)


def _typed(info: dict[str, Any], tensors: Mapping[str, Tensor]) -> Saved:
    def take(field: str, made: Callable[[Any], T]) -> T:
        try:
            return made(info[field])
        except (*FAULTS, RecursionError) as error:
            raise bad(f"{field}: {type(error).__name__}: {str(error)[:200]}") from error

    record = take("record", _record)
    generators = take("generators", unpack)
    if not generators:
        raise bad("the states of the generators are missing")
    return Saved(
        record=record,
        conditions=conditions_of(record),
        mark=take("mark", dict),
        next_row=take("next_row", _count),
        eps=take("eps", lambda found: tuple(None if e is None else float(e) for e in found)),
        seen=take("seen", _texts),
        replayable=take("replayable", bool),
        bad_from_start=take("bad_from_start", _texts),
        incidents=take("incidents", lambda found: tuple(Incident.from_json(i) for i in found)),
        generators=generators[0],
        batches=take("batches", lambda found: unpacked_batches(found, tensors, generators[1:])),
        base=take("base", lambda found: None if found is None else _record(found)),
        line=take("line", lambda found: tuple(dict(r) for r in decoded(found))),
        tensors=_under(STATE, tensors),
        past=_under(PAST, tensors),
    )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _record(found: Any) -> dict[str, Any]:
    record: dict[str, Any] = decoded(found)
    trial = BareState()
    trial.load(record)  # on a state of its own: nothing is half loaded
    for name in ("step", "updates", "attempt", "clean_steps"):
        _count(record[name])
    return record


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise ValueError(f"{str(value)[:40]} is not a count")
    return value


def _texts(found: Any) -> frozenset[str]:
    if not isinstance(found, list) or not all(isinstance(x, str) for x in found):
        raise TypeError("a list of names is expected")
    return frozenset(found)
