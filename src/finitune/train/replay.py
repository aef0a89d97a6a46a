"""The parts of a replay: which batch is asked for, which units of it, and where the batches of earlier steps are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from finitune.core.types import RowId
from finitune.data.collate import Batch, beginning, chosen, widened
from finitune.data.loader import Cursor, Loader
from finitune.engine.conditions import NotPossible
from finitune.engine.line import is_clean
from finitune.engine.policy import Action
from finitune.engine.port import Ask, Unit

Numbered = Sequence[tuple[int, Batch]]
"""Micro-batches with their numbers in the step: what they draw at random goes by the number."""


class Seen:
    """Where the batches of the last steps are. Not part of the training state: after a resume it fills anew."""

    SIZE = 64

    def __init__(self) -> None:
        self._cursors: dict[int, Cursor] = {}
        self._clean: dict[int, bool] = {}

    def used(self, step: int, cursor: Cursor) -> None:
        """The batch at ``cursor`` is that of ``step`` (1-based). That it is so does not change by going back."""
        self._cursors[step] = cursor
        if len(self._cursors) > 2 * self.SIZE:
            far = [s for s in self._cursors if abs(s - step) > self.SIZE]
            for old in far:
                del self._cursors[old]
                self._clean.pop(old, None)

    def judged(self, step: int, *, clean: bool) -> None:
        """Whether the step was committed without a warning. Tried several times, it must have been so each time."""
        self._clean[step] = clean and self._clean.get(step, True)

    def cursor_of(self, step: int) -> Cursor:
        """Raises NotPossible where it is not known any more."""
        if step not in self._cursors:
            raise NotPossible(f"where the batch of step {step} is, is not known any more")
        return self._cursors[step]

    def clean_up_to(self, step: int) -> tuple[int, ...]:
        """Clean steps, newest first."""
        found = [s for s, clean in self._clean.items() if clean and step - self.SIZE < s <= step]
        return tuple(sorted(found, reverse=True))


def recall(seen: Seen, loader: Loader, now: int, cursor: Cursor, records: Iterable[Mapping[str, Any]]) -> None:
    """After a resume: where the batches of the last steps up to ``now`` are, and which of them went well.

    Nothing is recalled where the data were cut differently before: the cursor is then another than by counting.
    """
    cursors = [Cursor()]
    for _ in range(now):
        cursors.append(loader.advance(cursors[-1]))
    if cursors[-1] != cursor:
        return
    for step in range(max(1, now - Seen.SIZE + 1), now + 1):
        seen.used(step, cursors[step - 1])
    for record in records:
        if record.get("kind") != "step" or record.get("action") not in (Action.PROCEED.value, Action.SKIP_BATCH.value):
            continue
        step, action = int(record["step"]), Action(record["action"])
        if now - Seen.SIZE < step <= now:
            seen.judged(step, clean=is_clean(action, (str(f["severity"]) for f in record.get("findings", ()))))


def units_of(layout: Sequence[Sequence[tuple[RowId, ...]]]) -> tuple[Unit, ...]:
    """Units of a step: its sequences, in order."""
    return tuple(Unit(m, b, rows) for m, micro in enumerate(layout) for b, rows in enumerate(micro))


def part_of(batches: Numbered, ask: Ask, units: Sequence[Unit], pad_id: int) -> Numbered:
    """What is asked for of a step. Raises NotPossible for units that are not there."""
    if ask.units is not None:
        batches = _only(batches, ask.units, units)
    if ask.prefix_tokens is not None:
        batches = [(micro, beginning(b, ask.prefix_tokens, pad_id)) for micro, b in batches]
    return batches


def _only(batches: Numbered, wanted: Sequence[int], units: Sequence[Unit]) -> Numbered:
    missing = [n for n in wanted if not 0 <= n < len(units)]
    if missing or not wanted:
        raise NotPossible(f"the step has {len(units)} units; asked for: {list(wanted)}")
    by_micro: dict[int, list[Unit]] = {}
    for number in sorted(set(wanted)):
        by_micro.setdefault(units[number].micro, []).append(units[number])
    return [
        (micro, chosen(batch, [u.index for u in by_micro[micro]], [r for u in by_micro[micro] for r in u.rows]))
        for micro, batch in batches
        if micro in by_micro
    ]


def padded(batches: Numbered, extra_tokens: int, pad_id: int) -> Numbered:
    """With more, or less, padding on the right. Raises NotPossible where too little would be left."""
    try:
        return [(micro, widened(batch, extra_tokens, pad_id)) for micro, batch in batches]
    except ValueError as error:
        raise NotPossible(str(error)) from error
