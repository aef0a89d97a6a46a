"""What came before a saved state: the newest batches and, where it is wanted, a snapshot to go on from.

An investigation asks for batches that went well, for older weights, for another course over the last steps. Where a
script is killed and goes on, the answers are to be the same: so the batches are saved too (tokens are small), and in
full histories the oldest snapshot from which the saved batches lead on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from finitune.adapters import bare_batch
from finitune.adapters.bare_generators import FAULTS
from finitune.adapters.bare_held import Held, versions_of
from finitune.core.types import RowId
from finitune.engine.capsule_nest import pack, unpack
from finitune.engine.conditions import NotPossible
from finitune.engine.snapshot import Snapshot, as_snapshot
from finitune.numerics.seeds import GeneratorStates

if TYPE_CHECKING:
    from finitune.adapters.bare_guard import BareGuard

HISTORIES = ("none", "batches", "full")
BATCH, PAST = "batch/", "past/"
_MOST_BYTES = 256 << 20
_MOST_STATES = 1024
_OF_THE_LINE = ("step", "treatment", "rollback", "resume", "state")


@dataclass(frozen=True, slots=True)
class Packed:
    """The past of a guard: JSON-able records, tensors by name, and the generators' states in their order."""

    batches: list[dict[str, Any]]
    tensors: dict[str, Tensor]
    states: list[GeneratorStates]
    base: dict[str, Any] | None = None
    """Record of the snapshot."""
    line: tuple[Mapping[str, Any], ...] = ()
    """Journal records since then."""


def packed_past(guard: BareGuard, history: str) -> Packed:
    """What a history of this kind holds."""
    found = Packed([], {}, [])
    if history == "none":
        return found
    for held in _newest(guard):
        number = len(found.batches)
        names = [f"{BATCH}{number}/{i}" for i in range(len(held.micros))]
        try:
            pairs = zip(held.micros, names, strict=True)
            micros = [pack(bare_batch.plain(m), name, found.tensors) for m, name in pairs]
        except NotPossible:
            break  # older ones could not be led on from
        found.states.extend(held.states)
        found.batches.append(_record(held, micros))
    return _with_base(guard, found) if history == "full" else found


def _newest(guard: BareGuard) -> Iterator[Held]:
    """Newest first, as far as there is room."""
    size, states, held = 0, 0, guard.port.held
    for step in range(guard.port.state.step, held.oldest - 1, -1):
        if step not in held:
            return
        one = held.at(step)
        size, states = size + one.num_bytes, states + len(one.states)
        if size > _MOST_BYTES or states > _MOST_STATES or versions_of(one.micros) != one.versions:
            return
        yield one


def _record(held: Held, micros: list[Any]) -> dict[str, Any]:
    return {
        "step": held.step,
        "micros": micros,
        "first_row": held.first_row,
        "num_rows": held.num_rows,
        "rates": [float(r) for r in held.rates],
        "num_states": len(held.states),
        "clean": held.clean,
        "rows": None if held.rows is None else [[str(r) for r in rows] for rows in held.rows],
    }


def _with_base(guard: BareGuard, found: Packed) -> Packed:
    first = min((b["step"] for b in found.batches), default=guard.port.state.step + 1)
    bases = [s for s in guard.ring.taken if s.step >= first - 1]
    if not bases:
        return found
    base = bases[0]
    line = [r for r in guard.keep.records() if r["kind"] in _OF_THE_LINE and int(r.get("attempt", 0)) >= base.attempt]
    tensors = {**found.tensors, **{PAST + n: t for n, t in base.tensors.items()}}
    return replace(found, tensors=tensors, base=base.record, line=tuple(line))


# -- and back ---------------------------------------------------------------------------------------------------------


def unpacked_batches(
    records: Any, tensors: Mapping[str, Tensor], states: tuple[GeneratorStates, ...]
) -> tuple[Held, ...]:
    """The batches, oldest first, as plain nests. Raises one of FAULTS (BadNest is a ValueError)."""
    found, place = [], 0
    for record in records:
        micros = tuple(unpack(m, tensors) for m in record["micros"])
        end = place + int(record["num_states"])
        if not place <= end <= len(states):
            raise ValueError("states of generators are missing")
        rows = record["rows"]
        held = Held(
            step=int(record["step"]),
            micros=micros,
            first_row=int(record["first_row"]),
            num_rows=int(record["num_rows"]),
            num_bytes=sum(map(bare_batch.num_bytes, micros)),
            versions=versions_of(micros),
            rates=tuple(float(r) for r in record["rates"]),
            states=list(states[place:end]),
            clean=None if record["clean"] is None else bool(record["clean"]),
            rows=None if rows is None else [[RowId.parse(r) for r in part] for part in rows],
        )
        found.append(held)
        place = end
    return tuple(reversed(found))


def put_base(guard: BareGuard, base: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """The snapshot of before goes into the ring; the training state stays. One that does not fit is left out."""
    present = as_snapshot(guard.port)
    try:
        guard.port.restore(tensors, base)
        guard.ring.take(guard.port, 0.0)
    except FAULTS:
        return
    finally:
        _back(guard, present)


def _back(guard: BareGuard, present: Snapshot) -> None:
    present.restore(guard.port)


def in_kind_of(template: Any, nest: Any) -> Any:
    """A plain nest as the script's own kind of batch, on its devices. Raises NotPossible for another structure."""
    if isinstance(template, Tensor) and isinstance(nest, Tensor):
        return nest.to(template.device)
    parts = dict(bare_batch.members(template) or ())
    if not parts:
        return nest
    if isinstance(nest, list | tuple):
        several = list(parts.values())
        made = [in_kind_of(several[min(i, len(several) - 1)], part) for i, part in enumerate(nest)]
        return type(nest)(made)
    if not isinstance(nest, Mapping) or nest.keys() != parts.keys():
        raise NotPossible("the batches of before are of another kind than those of now")
    return bare_batch.rebuilt(template, {key: in_kind_of(parts[key], part) for key, part in nest.items()})
