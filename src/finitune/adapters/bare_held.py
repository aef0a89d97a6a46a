"""The newest batches of a bare loop: references to them, and the generators' states that they were computed with.

The loop hands over one batch after another; going back means that the same batches come again. They are kept by step,
on their device, within a count and a number of bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from finitune.adapters import bare_batch
from finitune.core.types import RowId
from finitune.engine.conditions import NotPossible
from finitune.engine.port import Ask, Unit
from finitune.numerics.seeds import GeneratorStates

Numbered = list[tuple[int, Any]]
"""Micro-batches with their numbers in the step."""
RowNames = Callable[[Any], Sequence[Any]] | Sequence[Any]
"""Names of a batch's rows; or of the rows of the run, in the order in which they come up."""

MAX_HELD = 64
MAX_HELD_BYTES = 1 << 30


@dataclass(slots=True)
class Held:
    """The batch of one step."""

    step: int
    micros: tuple[Any, ...]
    first_row: int
    """Rows of the run before it."""
    num_rows: int
    num_bytes: int
    versions: tuple[int, ...]
    """Of the tensors; they count changes in place."""
    rates: tuple[Any, ...] = ()
    """The rate of each parameter group when the batch came."""
    states: list[GeneratorStates] = field(default_factory=list)
    """Before each micro-batch, as the loop's own run computed it; empty before."""
    after: GeneratorStates | None = None
    """After the last one: where the loop goes on."""
    clean: bool | None = None
    rows: list[list[RowId]] | None = None

    def check(self) -> None:
        """Raise NotPossible where the batch has been changed in place since it came."""
        if versions_of(self.micros) != self.versions:
            raise NotPossible(f"the loop has changed the tensors of step {self.step} in place since: copy them")


def versions_of(nest: Any) -> tuple[int, ...]:
    """Counts of changes in place of all tensors; inference tensors, which keep none, count as 0."""
    return tuple(0 if t.is_inference() else t._version for t in bare_batch.tensors(nest))


class HeldBatches:
    """The batches by step."""

    def __init__(
        self,
        split_rows: bare_batch.SplitRows | None = None,
        row_names: RowNames | None = None,
        *,
        max_count: int = MAX_HELD,
        max_bytes: int = MAX_HELD_BYTES,
    ) -> None:
        self.split_rows, self.row_names = split_rows, row_names
        self.max_count, self.max_bytes = max_count, max_bytes
        self.newest = 0
        """Step of the newest batch."""
        self.next_row = 0
        """Rows of the run so far."""
        self._held: dict[int, Held] = {}

    def push(self, batch: Any) -> Held:
        """The next batch: a nest, or a list of micro-batches. Older ones give way."""
        return self.put(micros_of(batch))

    def put(self, micros: tuple[Any, ...]) -> Held:
        """The same, taken apart already."""
        num_rows = sum(_rows_or_none(m) or 0 for m in micros)
        size = sum(map(bare_batch.num_bytes, micros))
        self.newest += 1
        held = Held(self.newest, micros, self.next_row, num_rows, size, versions_of(micros))
        self.next_row += num_rows
        self._held[self.newest] = held
        self._make_room()
        return held

    def go_on_after(self, step: int, next_row: int = 0, before: Sequence[Held] = ()) -> None:
        """The next batch is that of the step after ``step``; of those before only these are held."""
        self._held = {held.step: held for held in before}
        self.newest, self.next_row = step, next_row
        self._make_room()

    def recast(self, change: Callable[[Any], Any]) -> None:
        """Change every micro-batch; from one on that cannot be changed (NotPossible), older ones are given up."""
        for step in sorted(self._held, reverse=True):
            held = self._held[step]
            try:
                held.micros = tuple(change(m) for m in held.micros)
            except NotPossible:
                self._held = {s: h for s, h in self._held.items() if s > step}
                return
            held.versions = versions_of(held.micros)

    @property
    def oldest(self) -> int:
        """The first step that is still held; the next one where none is."""
        return min(self._held, default=self.newest + 1)

    def withdraw(self) -> None:
        """Forget the newest batch: it never came."""
        gone = self._held.pop(self.newest, None)
        self.next_row -= gone.num_rows if gone is not None else 0
        self.newest -= 1

    def _make_room(self) -> None:
        total = sum(h.num_bytes for h in self._held.values())
        for step in sorted(self._held)[:-1]:
            if len(self._held) <= self.max_count and total <= self.max_bytes:
                return
            total -= self._held.pop(step).num_bytes

    def at(self, step: int) -> Held:
        """Raises NotPossible where it is not held (any more)."""
        if step not in self._held:
            kept = f"steps {min(self._held)} to {max(self._held)}" if self._held else "none"
            raise NotPossible(f"the batch of step {step} is not held; held: {kept}")
        return self._held[step]

    def __contains__(self, step: int) -> bool:
        return step in self._held

    def judged(self, step: int, *, clean: bool) -> None:
        """Whether the step was committed without a warning. Tried several times, it must have been so each time."""
        held = self._held.get(step)
        if held is not None:
            held.clean = clean and held.clean is not False

    def clean_up_to(self, step: int) -> tuple[int, ...]:
        """Clean steps, newest first."""
        return tuple(sorted((s for s, h in self._held.items() if h.clean and s <= step), reverse=True))

    # -- rows -------------------------------------------------------------------------------------------------

    def rows(self, held: Held) -> list[list[RowId]]:
        """The names of the rows of each micro-batch. Raises NotPossible."""
        if held.rows is None:
            held.check()
            first, out = held.first_row, []
            for micro in held.micros:
                out.append(self._named(micro, first))
                first += len(out[-1])
            held.rows = out
        return held.rows

    def _named(self, micro: Any, first: int) -> list[RowId]:
        names = self._names(micro, first)
        if names is None:
            return [RowId("batch", i + 1, digest) for i, digest in enumerate(bare_batch.row_digests(micro))]
        if all(isinstance(n, RowId) for n in names):
            return list(names)
        try:
            digests = bare_batch.row_digests(micro)
        except NotPossible:
            digests = [""] * len(names)
        if len(digests) != len(names):
            raise NotPossible(f"row_ids gives {len(names)} names for {len(digests)} rows")
        # A row without content to hash is known by its name.
        pairs = enumerate(zip(names, digests, strict=True))
        return [RowId(str(n), i + 1, d or RowId.of("", 0, str(n).encode()).digest) for i, (n, d) in pairs]

    def _names(self, micro: Any, first: int) -> list[Any] | None:
        if self.row_names is None:
            return None
        if callable(self.row_names):
            return list(self.row_names(micro))
        count = bare_batch.num_rows(micro)
        return list(self.row_names[first : first + count]) if first + count <= len(self.row_names) else None

    def units(self, held: Held, quarantine: frozenset[str]) -> tuple[Unit, ...]:
        """The rows of a step that are not in quarantine. Raises NotPossible where it cannot be taken apart."""
        if self.split_rows is None:
            strange = [place for m in held.micros for place in bare_batch.foreign(m)]
            if strange:
                raise NotPossible(f"the batch holds {', '.join(strange[:3])}: say how to split it with split_rows=")
        kept = [[r for r in micro if r.digest not in quarantine] for micro in self.rows(held)]
        return tuple(Unit(m, i, (row,)) for m, micro in enumerate(_nonempty(kept)) for i, row in enumerate(micro))

    # -- parts ------------------------------------------------------------------------------------------------

    def micros(self, held: Held, quarantine: frozenset[str]) -> tuple[Numbered, int]:
        """The micro-batches of a step, numbered, without the rows in quarantine; and how many rows were left out.

        A micro-batch without rows is left out altogether. Raises NotPossible.
        """
        if not quarantine:
            return list(enumerate(held.micros)), 0
        out, left_out = Numbered(), 0
        for rows, micro in zip(self.rows(held), held.micros, strict=True):
            kept = [i for i, row in enumerate(rows) if row.digest not in quarantine]
            left_out += len(rows) - len(kept)
            if len(kept) == len(rows):
                out.append((len(out), micro))
            elif kept:
                out.append((len(out), bare_batch.picked(micro, kept, self.split_rows)))
        return out, left_out

    def part(self, numbered: Numbered, ask: Ask, units: Sequence[Unit]) -> Numbered:
        """What is asked for of a step. Raises NotPossible for units that are not there."""
        if ask.units is not None:
            numbered = self._only(numbered, ask.units, units)
        if ask.prefix_tokens is not None:
            numbered = [(n, bare_batch.beginning(m, ask.prefix_tokens)) for n, m in numbered]
        return numbered

    def _only(self, numbered: Numbered, wanted: Sequence[int], units: Sequence[Unit]) -> Numbered:
        if not wanted or any(not 0 <= n < len(units) for n in wanted):
            raise NotPossible(f"the step has {len(units)} units; asked for: {list(wanted)}")
        by_micro: dict[int, list[int]] = {}
        for number in sorted(set(wanted)):
            by_micro.setdefault(units[number].micro, []).append(units[number].index)
        count = Counts(units)
        return [
            (n, bare_batch.picked(m, bare_batch.filled(by_micro[n], count.of(n)), self.split_rows))
            for n, m in numbered
            if n in by_micro
        ]


@dataclass(frozen=True, slots=True)
class Counts:
    """How many units each micro-batch has."""

    units: Sequence[Unit]

    def of(self, micro: int) -> int:
        """Units of one micro-batch."""
        return sum(u.micro == micro for u in self.units)


def micros_of(batch: Any) -> tuple[Any, ...]:
    """A list is one of micro-batches, unless a tensor or a plain value stands in it: then it is a nest itself."""
    if isinstance(batch, list) and batch and all(bare_batch.is_container(m) for m in batch):
        return tuple(batch)
    return (batch,)


def _nonempty(parts: list[list[RowId]]) -> list[list[RowId]]:
    return [p for p in parts if p]


def _rows_or_none(micro: Any) -> int | None:
    try:
        return bare_batch.num_rows(micro)
    except NotPossible:
        return None
