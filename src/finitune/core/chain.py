"""Lines that are chained: one record of strict JSON a line, each bound to the line before it by a checksum.

    {"schema": 2, "kind": "step", ..., "prev": "0a1b2c3d", "crc": "4e5f6071"}

    prev    the crc of the line before; of a line without one, the CRC-32 of its bytes; before the first line 00000000
    crc     CRC-32 of the line's bytes before it, ``prev`` included; 8 hexadecimal digits

A changed bit shows in the line's own ``crc``, whatever stands before it; a line that is missing, doubled, swapped or
put in shows in the next ``prev``. So a damaged place condemns neither the lines before nor those after it. CRC-32 finds
every single fault of up to 32 bits in a row, and misses one in 2^32 of the others; it proves nothing against somebody
who wants to deceive. Lines of schema 1 have no checksum: they are taken as they are, as long as none with one came
before.

JSON knows no NaN: a non-finite float is written as the string "NaN", "Infinity" or "-Infinity" and :func:`number`
reads it back.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, BinaryIO

from finitune.core.messages.catalogue import text

NOTHING = 0
"""What the first line is bound to."""

_PREV = b', "prev": "%08x"'
_CRC = b', "crc": "%08x"}\n'
_CRC_BYTES = len(_CRC % 0)
_SEAL_BYTES = len(_PREV % 0) + _CRC_BYTES
_SEAL = re.compile(rb', "prev": "([0-9a-f]{8})", "crc": "([0-9a-f]{8})"\}\n')
_BLOCK_BYTES = 64 << 10

# One encoder and one decoder for all lines: json.dumps and json.loads make a new one for every call with options.
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_ASCII_ENCODER = json.JSONEncoder(ensure_ascii=True, allow_nan=False)


def encode(value: Any) -> Any:
    """``value`` with every non-finite float spelled out, and tuples and mappings made JSON-able."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {_key(k): encode(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(v) for v in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return str(value)


def _key(key: Any) -> str:
    """A key as JSON spells it, so that the fast way (json alone) and :func:`encode` give the same line."""
    return json.dumps(key) if key is None or isinstance(key, bool) else str(key)


def number(value: Any) -> float:
    """A number of a record as a float; "NaN", "Infinity" and "-Infinity" are understood."""
    return math.nan if value is None else float(value)


def seal(record: Mapping[str, Any], prev: int) -> bytes:
    """The line of ``record`` (not empty, without "prev" and "crc") after a line whose link is ``prev``."""
    body = _json(record)[:-1] + _PREV % prev
    return body + _CRC % zlib.crc32(body)


def _json(record: Mapping[str, Any]) -> bytes:
    """Strict JSON; only a record that json itself refuses (NaN, foreign types) pays for being looked through."""
    try:
        line = _ENCODER.encode(record)
    except (TypeError, ValueError):
        line = _ENCODER.encode(encode(record))
    try:
        return line.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: UTF-8 has no place for it, an escape has
        return _ASCII_ENCODER.encode(encode(record)).encode()


def crc_end(link: str) -> bytes:
    """How a line with this checksum (8 hexadecimal digits) ends."""
    return b', "crc": "%s"}\n' % link.encode()


def sealed_link(line: bytes | bytearray) -> int:
    """The link of a line, or of lines, that :func:`seal` made."""
    return int(line[-3 - 8 : -3], 16)


class Reason(str, Enum):
    """What may be wrong with a line."""

    NOT_JSON = "not JSON"
    NO_RECORD = "not a record"
    BITS = "bits changed"
    GAP = "a line is missing before this one"
    REPEATED = "repeated"
    MISPLACED = "does not belong here"
    UNCHECKED = "no checksum, after lines that have one"


@dataclass(frozen=True, slots=True)
class Damage:
    """A damaged place; the text of it is in the user's language."""

    line: int
    """1-based."""
    reason: Reason

    def __str__(self) -> str:
        return text("journal.damage", line=self.line, reason=text(f"journal.{self.reason.name.lower()}"))


@dataclass(frozen=True, slots=True)
class Line:
    """One line by itself, whatever stands before it."""

    record: dict[str, Any] | None
    """Without "prev" and "crc"; None where it may not be trusted."""
    reason: Reason | None
    """Why there is no record."""
    link: int
    """What the next line is bound to."""
    prev: int | None = None
    """What this one is bound to; None for lines of schema 1 and those that cannot be read."""
    torn_if_last: bool = False
    """It is no JSON, and does not end in a checksum as a whole line does."""


def parse(raw: bytes) -> Line:
    """Look at one line, with its newline. Never raises, whatever the bytes."""
    match = _SEAL.fullmatch(raw[-_SEAL_BYTES:])
    link = int(match[2], 16) if match else zlib.crc32(raw.rstrip(b"\n"))
    found = _loads(raw)
    if isinstance(found, Reason):
        return Line(None, found, link, torn_if_last=found is Reason.NOT_JSON and match is None)
    if match is None:
        # Only schema 1 has lines without a checksum.
        return Line(found, None, link) if found.get("schema", 1) == 1 else Line(None, Reason.BITS, link)
    if zlib.crc32(raw[:-_CRC_BYTES]) != link:
        return Line(None, Reason.BITS, link)
    del found["prev"], found["crc"]
    return Line(found, None, link, int(match[1], 16))


def _refuse(token: str) -> None:
    raise ValueError(f"{token} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _loads(raw: bytes) -> dict[str, Any] | Reason:
    try:
        found = _DECODER.decode(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        return Reason.NOT_JSON
    return found if isinstance(found, dict) and "kind" in found else Reason.NO_RECORD


class _Chain:
    """Where the lines so far have led."""

    def __init__(self) -> None:
        self.last = NOTHING
        self.unread = False
        """The line just before cannot be read: nobody knows what it was bound to, or its link."""
        self.taken: set[int] = set()
        """Links of the checked lines so far."""

    def place(self, line: Line, following: Line | None) -> Reason | None:
        """What is wrong with where a readable line stands."""
        if line.prev is None:
            return Reason.UNCHECKED if self.taken else None
        if line.prev == self.last:
            return None
        if line.link in self.taken:
            return Reason.REPEATED
        if line.prev in self.taken:
            return Reason.MISPLACED
        if self.unread:  # what is missing is that unreadable line, which was named already
            return None
        if following is not None and following.prev == self.last:
            return Reason.MISPLACED
        return Reason.GAP

    def take(self, line: Line) -> None:
        """``line`` is part of the chain."""
        self.last, self.unread = line.link, False
        if line.prev is not None:
            self.taken.add(line.link)


def checked(lines: Iterable[bytes]) -> Iterator[dict[str, Any] | Damage]:
    """The records and the damaged places of a journal's lines, in order.

    Where a line is missing, the place comes first and then the record after it, which is whole. Any other damage
    stands for the line itself. What has no newline, or is the last and neither JSON nor ended by a checksum, is a torn
    end and no damage.
    """
    chain = _Chain()
    for count, (line, following) in enumerate(_with_next(lines), 1):
        if line.record is None:
            if following is None and line.torn_if_last:
                return
            assert line.reason is not None
            chain.unread = True
            yield Damage(count, line.reason)
            continue
        reason = chain.place(line, following)
        if reason is not None:
            yield Damage(count, reason)
        if reason in (None, Reason.GAP):
            chain.take(line)
            yield line.record


def _with_next(lines: Iterable[bytes]) -> Iterator[tuple[Line, Line | None]]:
    """Every whole line with the one after it."""
    before: Line | None = None
    for raw in lines:
        line = parse(raw)
        if before is not None:
            yield before, line
        before = line
        # A writer may be at work: what follows an unfinished line now could be its rest.
        if not raw.endswith(b"\n"):
            return
    if before is not None:
        yield before, None


def backwards(handle: BinaryIO, size_bytes: int) -> Iterator[bytes]:
    """The lines in the first ``size_bytes`` of a file from the last to the first; a torn end is the first given."""
    place, rest = size_bytes, b""
    while place > 0:
        # A line of any length costs time in proportion to it: the blocks grow with it.
        length = min(place, max(_BLOCK_BYTES, len(rest)))
        place -= length
        handle.seek(place)
        rest, *whole = _split(handle.read(length) + rest)
        yield from reversed(whole)
    if rest:
        yield rest


def _split(block: bytes) -> list[bytes]:
    """Lines with their newlines (only that one byte ends a line); at least one."""
    *ended, rest = block.split(b"\n")
    return [line + b"\n" for line in ended] + ([rest] if rest else [])


@dataclass(frozen=True, slots=True)
class End:
    """Where a journal's whole lines end."""

    num_bytes: int
    link: int
    torn_bytes: int


def end_of(handle: BinaryIO, size_bytes: int) -> End:
    """Where the whole lines in the first ``size_bytes`` of a file end; reads its last two lines at most.

    Torn is what has no newline, or else a last line that is no JSON and has no checksum; never more than one line.
    """
    torn_bytes = 0
    for raw in backwards(handle, size_bytes):
        line = parse(raw)
        if not torn_bytes and (not raw.endswith(b"\n") or line.torn_if_last):
            torn_bytes = len(raw)
            continue
        return End(size_bytes - torn_bytes, line.link, torn_bytes)
    return End(size_bytes - torn_bytes, NOTHING, torn_bytes)
