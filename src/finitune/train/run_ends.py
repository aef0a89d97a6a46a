"""The two ends of a journal: what a list of runs needs to know, without reading what lies between.

head   the opening record and the first held-out loss, within the first 128 KiB
tail   read backwards: how the last session stands, the last step, the last held-out loss, within the last 1 MiB

A step record takes some 600 bytes, so a journal of 100 000 steps is 60 MB; the ends of a hundred such are read in
well under a second. What lies outside of both windows is unknown (None), never guessed. Every line is checked by
its own checksum, not by its place; a line longer than a window is not read at all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from finitune.core import chain

_HEAD_BYTES = 128 << 10
_TAIL_BYTES = 1 << 20
_WHOLE_TAIL_BYTES = 64 << 10
"""Every line of so much of the end is looked at: openings of a resumed run, damaged lines."""
_BLOCK_BYTES = 64 << 10

_KIND = re.compile(rb'"kind": ?"([a-z_]+)"')
_KIND_WITHIN_BYTES = 200

OPENINGS = ("start", "resume")
_MOVES = ("step", "rollback", *OPENINGS, "end")

Record = Mapping[str, Any]


@dataclass(slots=True)
class Ends:
    """What stands at the ends of a journal; None where it was not met."""

    first: Record | None = None
    """The opening of the first session ("start", or "resume" where the start is lost)."""
    first_eval: Record | None = None
    opening: Record | None = None
    """The opening of the newest session that was met."""
    session: Record | None = None
    """The newest of "start", "resume" and "end"."""
    end: Record | None = None
    """``session``, where it is an "end"."""
    move: Record | None = None
    """The newest record that tells a step number."""
    step: Record | None = None
    """The newest "step"."""
    last_eval: Record | None = None
    saved: bool = False
    """Whether a checkpoint was written, as far as was read."""
    num_bytes: int = 0
    num_records: int = 0
    """Of the tail."""
    num_damaged: int = 0
    """Lines that are no record, as far as was read; torn last lines of killed sessions do not count."""

    @property
    def complete(self) -> bool:
        """Whether nothing older can tell more about where the run stands."""
        return None not in (self.session, self.move, self.step, self.last_eval)


def ends_of(path: Path) -> Ends:
    """Read the ends of a journal, also while it is being written. Raises OSError."""
    ends = Ends()
    with path.open("rb") as handle:
        ends.num_bytes = os.fstat(handle.fileno()).st_size
        _read_head(handle, ends)
        _read_tail(handle, ends)
    return ends


def parse(raw: bytes) -> Record | None:
    """One line, with its newline, as a record; None where it is none or its checksum does not fit."""
    record = chain.parse(raw).record
    return record if record is not None and isinstance(record["kind"], str) else None


def _kind(raw: bytes) -> str | None:
    """The kind of a line, without decoding it; None where it does not stand at the front."""
    found = _KIND.search(raw, 0, _KIND_WITHIN_BYTES)
    return found[1].decode() if found else None


def integer(record: Record | None, name: str) -> int | None:
    """A whole number of a record; None where there is none."""
    value = record.get(name) if record is not None else None
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63 else None


def real(record: Record | None, name: str) -> float | None:
    """A number of a record, NaN and inf included; None where there is none."""
    value = record.get(name) if record is not None else None
    if value is None or isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return chain.number(value)
    except (ValueError, OverflowError):
        return None


def used_up(record: Record | None) -> int | None:
    """Batches used up after a record that tells a step number; None for any other."""
    kind = record.get("kind") if record is not None else None
    if kind == "end":
        return integer(record, "steps")
    if kind == "rollback":
        return integer(record, "to_step")
    step = integer(record, "step")
    # A step that overflowed is tried again with the same batch.
    again = kind == "step" and record is not None and record.get("action") == "retry_smaller_scale"
    return step - 1 if again and step is not None else step


def _read_head(handle: BinaryIO, ends: Ends) -> None:
    """Read from the start up to the first held-out loss."""
    left = _HEAD_BYTES
    while left > 0 and ends.first_eval is None:
        raw = handle.readline(left)
        if not raw.endswith(b"\n"):  # the end of the file, or of the window
            break
        left -= len(raw)
        record = parse(raw) if _kind(raw) in (None, "eval", *OPENINGS) else None
        if record is None:
            continue
        if record["kind"] in OPENINGS and ends.first is None:
            ends.first = record
        elif record["kind"] == "eval":
            ends.first_eval = record


def _read_tail(handle: BinaryIO, ends: Ends) -> None:
    """Read backwards until enough is known."""
    read_bytes = 0
    newer: str | None = None  # the kind of the record after this line
    for number, raw in enumerate(_lines_backwards(handle, ends.num_bytes)):
        read_bytes += len(raw)
        if read_bytes > _WHOLE_TAIL_BYTES:
            if ends.complete or read_bytes > _TAIL_BYTES:
                break
            kind = _kind(raw)
            if kind is not None and not _wanted(kind, ends):
                continue
        record = parse(raw)
        if record is not None:
            _take(record, ends)
            newer = str(record["kind"])
        elif number > 0 and newer not in OPENINGS:
            # The last line may be on its way, and what a kill has torn may stand before an opening.
            ends.num_damaged += 1
            newer = None


def _wanted(kind: str, ends: Ends) -> bool:
    """Whether a record of this kind could tell something new."""
    return (
        (kind == "eval" and ends.last_eval is None)
        or (kind == "save" and not ends.saved)
        or (kind == "step" and ends.step is None)
        or (kind in _MOVES and ends.move is None)
        or (kind in (*OPENINGS, "end") and ends.session is None)
    )


def _take(record: Record, ends: Ends) -> None:
    """Note the newest record of each sort; called from the newest to the oldest."""
    kind = record["kind"]
    ends.num_records += 1
    if kind in OPENINGS and ends.opening is None:
        ends.opening = record
    if kind in (*OPENINGS, "end") and ends.session is None:
        ends.session = record
        ends.end = record if kind == "end" else None
    if kind in _MOVES and ends.move is None:
        ends.move = record
    if kind == "step" and ends.step is None:
        ends.step = record
    if kind == "eval" and ends.last_eval is None:
        ends.last_eval = record
    ends.saved = ends.saved or kind == "save"


def _lines_backwards(handle: BinaryIO, size: int) -> Iterator[bytes]:
    """The lines of a file from the last to the first, with their newlines; a torn end is the first one given.

    As ``chain.backwards``, but it never reads more than the window of the tail: not even for one line.
    """
    place, rest = size, b""
    while place > 0 and size - place <= _TAIL_BYTES:
        length = min(_BLOCK_BYTES, place)
        place -= length
        handle.seek(place)
        # Not splitlines: it would end lines at a carriage return, too.
        first, *others = (handle.read(length) + rest).split(b"\n")
        if others:
            first, others = first + b"\n", [line + b"\n" for line in others[:-1]] + others[-1:]
            yield from (line for line in reversed(others) if line)
        rest = first
    if place == 0 and rest:
        yield rest
