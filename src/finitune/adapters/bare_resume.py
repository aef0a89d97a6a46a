"""A guarded script is killed and goes on: what the guard saves, and how it takes it over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from finitune.adapters.bare import BarePort
from finitune.adapters.bare_generators import pack
from finitune.adapters.bare_held import micros_of
from finitune.adapters.bare_past import HISTORIES, in_kind_of, packed_past, put_base
from finitune.adapters.bare_saved import STATE, Saved, parse, to_tensors
from finitune.adapters.codes import BAD_ARGUMENT
from finitune.adapters.codes_script import GOES_ON_ELSEWHERE
from finitune.core.chain import encode
from finitune.core.errors import UserError
from finitune.core.types import Finding
from finitune.numerics.fingerprint import RECORD, UNKNOWN, fingerprint, first_difference
from finitune.numerics.seeds import GeneratorStates

if TYPE_CHECKING:
    from finitune.adapters.bare_guard import BareGuard

GENERATORS = ("next_step", "now", "keep")
_PARTS = ("scheduler", "scaler")


def saved_state(guard: BareGuard, history: str) -> dict[str, Tensor]:
    """See :meth:`BareGuard.state_dict`."""
    _one_of("guard.state_dict", "history", history, HISTORIES)
    port, record, past = guard.port, guard.port.state_record(), packed_past(guard, history)
    content = {
        "record": record,
        "mark": fingerprint(port.state_tensors(), record).to_json(),
        "next_row": port.held.next_row,
        "eps": port.eps,
        "seen": sorted(port.realiser.seen.names),
        "replayable": port.replayable,
        "bad_from_start": sorted(guard.engine.check.bad_from_start),
        "incidents": [i.to_json() for i in guard.incidents],
        "generators": pack([GeneratorStates.now(), *past.states]),
        "batches": past.batches,
        "base": past.base,
        "line": list(past.line),
    }
    return to_tensors(content, {**past.tensors, **{STATE + n: t for n, t in port.recast().items()}})


def _one_of(where: str, name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        problem, cure = f"{value!r} is not known", f"choose one of {', '.join(known)}"
        raise UserError(BAD_ARGUMENT, where, name=name, problem=problem, cure=cure)


def taken_over(guard: BareGuard, state: Mapping[str, Tensor], generators: str) -> Arrival:
    """See :meth:`BareGuard.load_state_dict`."""
    _one_of("guard.load_state_dict", "generators", generators, GENERATORS)
    saved = parse(state)
    guard.port.take_over(saved)
    if not saved.replayable:
        guard.port.give_up_replay()
    guard.engine.check.bad_from_start = saved.bad_from_start
    guard.incidents[:] = saved.incidents
    for snapshot in list(guard.ring.taken):
        guard.ring.forget(snapshot)
    guard.keep.go_on(saved.line)
    if generators == "now":
        saved.generators.restore()
    return Arrival(saved, restore_generators=generators == "next_step")


@dataclass(frozen=True, slots=True)
class Arrival:
    """What remains to be done right before the first step: by then everything else was loaded too."""

    saved: Saved
    restore_generators: bool

    def finish(self, guard: BareGuard, batch: Any) -> Iterator[Finding]:
        """Put the generators and the past back; tell what is not as it was when the state was saved."""
        port = guard.port
        if self.restore_generators:
            self.saved.generators.restore()
        port.scaling.forget()
        newest = micros_of(batch)
        port.held.recast(lambda micro: in_kind_of(newest[0], micro))
        if self.saved.base is not None:
            put_base(guard, self.saved.base, self.saved.past)
        for name in self._differing(port):
            yield GOES_ON_ELSEWHERE.find(name, name=name, step=self.saved.record["step"])

    def _differing(self, port: BarePort) -> Iterator[str]:
        record = port.state_record()
        different = first_difference(self.saved.mark, fingerprint(port.state_tensors(), record))
        own_rates = port.loop.scheduler is None and str(different).startswith("(group")
        if different not in (None, RECORD, UNKNOWN) and not own_rates:
            yield str(different)
        # The rest of the record is the guard's own, and rates that the loop sets by itself may have moved on.
        for part in _PARTS:
            if encode(record[part]) != encode(self.saved.record.get(part)):
                yield part
