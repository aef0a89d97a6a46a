"""The journal: append-only JSON lines, the run's truth.

Each line is one record ``{"schema", "kind", "time", ...}``, chained to the line before (``core/chain.py``): what was
changed, lost, doubled or put in is found and named by its line. What a killed run left torn at the end is cut off.

The file is always a prefix of what was said. What the disk refuses waits in memory, and so does what is not yet known
to be *on* the disk (a failed ``fsync`` forgets pages that the system had taken: they are written again). So a disk
that is full for a while costs nothing, and a folder that vanishes costs what stood in it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from finitune.core import chain
from finitune.core.chain import Damage, Reason, encode, number
from finitune.core.files import fsync_path

__all__ = ["SCHEMA", "Damage", "Journal", "Reason", "check", "encode", "number", "read", "read_checked", "tail"]

SCHEMA = 2
_OWN = frozenset(("schema", "prev", "crc"))
_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
_CHUNK_BYTES = 1 << 20
# So much may be written without being on the disk for sure, since it is kept in memory until then. 4 MiB are some
# 7000 steps; checkpoints come sooner, and sync as well.
_UNSYNCED_BYTES = 4 << 20
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0


@dataclass(slots=True)
class _Stream:
    """What was said since the file was last known to be on the disk."""

    base: int
    """Place in the file, in bytes, of the first unsynced line."""
    link: int
    """Link of the line before that."""
    unsynced: bytearray = field(default_factory=bytearray)
    """Whole lines."""
    written: int = 0
    """Bytes of them that the system has taken."""

    @property
    def end_link(self) -> int:
        """Link of the last line."""
        return chain.sealed_link(self.unsynced) if self.unsynced else self.link


class Journal:
    """Appends records to one file; for one thread.

    Every record is handed to the system before :meth:`write` returns, or waits in memory while the system refuses:
    ``fault`` is the refusal in force and ``pending_bytes`` how much waits.

    Raises OSError where the file cannot be opened.
    """

    def __init__(self, path: Path, *, max_pending_bytes: int = 64 << 20) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.max_pending_bytes = path, max_pending_bytes
        self.fault: OSError | None = None
        self.cut_bytes = 0
        """Length of the torn end that was cut off on opening."""
        self._pause_s, self._retry_at_s = _FIRST_PAUSE_S, 0.0
        self._entry_synced = False
        self._descriptor: int | None = os.open(path, _FLAGS, 0o666)
        try:
            end = _end_of(self._descriptor)
            if end.torn_bytes:
                os.ftruncate(self._descriptor, end.num_bytes)
        except BaseException:
            os.close(self._descriptor)
            raise
        self.cut_bytes = end.torn_bytes
        self._stream = _Stream(end.num_bytes, end.link)

    @property
    def pending_bytes(self) -> int:
        """Bytes that wait for the disk."""
        return len(self._stream.unsynced) - self._stream.written

    @property
    def link(self) -> str:
        """The last record's checksum: it stands for everything said so far. "00000000" for nothing."""
        return f"{self._stream.end_link:08x}"

    def write(self, kind: str, **record: Any) -> None:
        """Append one record of ``kind``; a refusal of the disk is told by ``fault``, and tried again now and then.

        Raises:
            OSError: more than ``max_pending_bytes`` would wait. This record is not taken, those before it still wait.
            ValueError: the journal is closed, or the record has a "schema", "prev" or "crc" of its own.
        """
        self._opened()
        if not _OWN.isdisjoint(record):
            raise ValueError(f"{', '.join(sorted(_OWN))} are the journal's own fields")
        whole = {"schema": SCHEMA, "kind": kind, "time": round(time.time(), 3), **record}
        line = chain.seal(whole, self._stream.end_link)
        self._make_room(len(line))
        self._stream.unsynced += line  # one operation: an interrupt cannot leave half of it
        if self.fault is None or time.monotonic() >= self._retry_at_s:
            self._flush()
            if self.fault is None and len(self._stream.unsynced) >= _UNSYNCED_BYTES:
                with contextlib.suppress(OSError):  # told by fault
                    self.sync()

    def sync(self) -> None:
        """Flush to the disk itself (at checkpoints and at the end); always tries, whatever was refused before.

        Raises:
            OSError: something still waits, or the disk gave an error. FileNotFoundError: the file is gone from its
                path (run folder removed, mount vanished); see :meth:`reopen`. All that was said since the last good
                sync then waits.
            ValueError: the journal is closed.
        """
        descriptor = self._opened()
        self._flush()
        if self.fault is not None:
            raise self._refusal(self.fault)
        try:
            os.fsync(descriptor)
            self._check_place()
            if not self._entry_synced:
                fsync_path(self.path.parent)
                self._entry_synced = True
        except OSError as error:
            self._refused(error)
            # The system may have dropped what it had taken, and a second fsync would not say so
            # (https://wiki.postgresql.org/wiki/Fsync_Errors): all of it is written again, to the same place.
            self._stream.written = 0
            raise self._refusal(error) from error
        stream = self._stream
        self._stream = _Stream(stream.base + len(stream.unsynced), stream.end_link)
        self._pause_s = _FIRST_PAUSE_S

    def reopen(self) -> None:
        """Start again at the same path, after the run folder has vanished and come back.

        Where the file is there again as it was, the journal goes on in it. Else it goes on behind what stands there,
        or in a new file: from the first line that was not on the disk for sure. That line's ``prev`` then tells any
        reader that lines are missing before it. Nothing that waits is lost.

        Raises OSError where the folder is not there or the file cannot be opened; nothing is changed then.
        """
        old = self._opened()
        if not self.path.parent.is_dir():  # made anew, it might stand below the mount point of the vanished disk
            raise FileNotFoundError(errno.ENOENT, "the folder is not there", str(self.path.parent))
        fresh = os.open(self.path, _FLAGS, 0o666)
        try:
            base = self._base_in(fresh)
            os.ftruncate(fresh, base)
        except BaseException:
            os.close(fresh)
            raise
        stream = self._stream
        self._descriptor, self._stream = fresh, _Stream(base, stream.link, stream.unsynced)
        self._entry_synced = False
        with contextlib.suppress(OSError):
            os.close(old)
        self._flush()

    def close(self) -> None:
        """Sync and close; further writes raise ValueError, further closes do nothing.

        Raises OSError where something still waits or is not on the disk for sure, as :meth:`sync` does. The journal
        stays open then, so that it can be tried again once there is room; whoever gives up calls :meth:`abandon`.
        """
        if self._descriptor is not None:
            self.sync()
            self.abandon()

    def abandon(self) -> int:
        """Close as it stands, without trying any more. Returns the bytes that were never written: they are lost."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        return self.pending_bytes

    def waiting(self) -> list[dict[str, Any]]:
        """The records that are not in the file yet, or only in part: what :func:`read` cannot see."""
        stream = self._stream
        first = stream.unsynced.rfind(b"\n", 0, stream.written) + 1
        lines = bytes(stream.unsynced[first:]).splitlines(keepends=True)
        return [record for line in lines if (record := chain.parse(line).record) is not None]

    def _opened(self) -> int:
        if self._descriptor is None:
            raise ValueError(f"the journal {self.path} is closed")
        return self._descriptor

    def _make_room(self, num_bytes: int) -> None:
        """Raise OSError where ``num_bytes`` more may not wait."""
        if self.pending_bytes and self.pending_bytes + num_bytes > self.max_pending_bytes:
            self._flush()
            if self.fault is not None:
                raise self._refusal(self.fault)

    def _flush(self) -> None:
        """Write what waits, from where the file stopped; a refusal becomes ``fault``."""
        stream, descriptor = self._stream, self._opened()
        try:
            if self.fault is not None:
                self._check_place()
            while stream.written < len(stream.unsynced):
                # Always to the known place: what was written without being told so (an interrupt, a network file
                # system) is written again as it is.
                os.lseek(descriptor, stream.base + stream.written, os.SEEK_SET)
                count = os.write(descriptor, stream.unsynced[stream.written : stream.written + _CHUNK_BYTES])
                if count <= 0:
                    raise OSError(errno.EIO, "the system took no byte", str(self.path))
                stream.written += count
        except OSError as error:
            self._refused(error)
            return
        self.fault = None

    def _refused(self, error: OSError) -> None:
        self.fault = error
        self._retry_at_s = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def _refusal(self, error: OSError) -> OSError:
        """The same refusal as a new exception (one raised twice would drag its old traceback along)."""
        reason = f"{error.strerror or error} ({self.pending_bytes} bytes wait)"
        return OSError(error.errno or errno.EIO, reason, str(self.path))

    def _check_place(self) -> None:
        """Raise FileNotFoundError where the path names this file no more."""
        here = os.fstat(self._opened())
        try:
            if here.st_nlink and os.path.samestat(os.stat(self.path), here):
                return
        except (FileNotFoundError, NotADirectoryError):
            pass
        raise FileNotFoundError(errno.ENOENT, "the journal is gone from its path", str(self.path))

    def _base_in(self, descriptor: int) -> int:
        """Where the first unsynced line belongs in a file opened anew."""
        stream = self._stream
        ours = _end_of(descriptor, stream.base)
        if (ours.num_bytes, ours.link) == (stream.base, stream.link):
            os.lseek(descriptor, stream.base, os.SEEK_SET)
            with open(descriptor, "rb", closefd=False) as handle:
                if stream.unsynced.startswith(handle.read(len(stream.unsynced) + 1)):
                    return stream.base
        return _end_of(descriptor).num_bytes


def _end_of(descriptor: int, size_bytes: int | None = None) -> chain.End:
    """Where the whole lines end in a file, or in its first ``size_bytes``."""
    with open(descriptor, "rb", closefd=False) as handle:
        size = os.fstat(descriptor).st_size
        return chain.end_of(handle, size if size_bytes is None else min(size, size_bytes))


def read_checked(path: Path) -> Iterator[dict[str, Any] | Damage]:
    """Yield the records of a journal and its damaged places, in order, also while it is being written.

    Where a line is missing, its place comes before the whole record after it; any other damage stands for the line
    itself. A torn end is no damage; see :func:`torn_bytes`. Records come without "prev" and "crc".

    Raises OSError where the file cannot be read; never for its content.
    """
    with path.open("rb") as handle:
        yield from chain.checked(handle)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole, checked records of a journal; the damaged are passed over. As :func:`read_checked`."""
    return (item for item in read_checked(path) if not isinstance(item, Damage))


def check(path: Path) -> list[Damage]:
    """The damaged places of a journal. Raises OSError where it cannot be read."""
    return [item for item in read_checked(path) if isinstance(item, Damage)]


def torn_bytes(path: Path) -> int:
    """How long the torn end of a journal is; 0 for none. Of a journal that is being written it may be on its way."""
    with path.open("rb") as handle:
        return chain.end_of(handle, os.fstat(handle.fileno()).st_size).torn_bytes


def holds(path: Path, link: str) -> bool:
    """Whether a line with this checksum stands in the journal. Raises OSError where it cannot be read."""
    end = chain.crc_end(link)
    with path.open("rb") as handle:
        return any(raw.endswith(end) for raw in handle)


def tail(path: Path, num_records: int) -> list[dict[str, Any]]:
    """The last records, oldest first, without reading more of the file than they need; the damaged are passed over.

    Each line is checked by itself, not by its place. Raises OSError where the file cannot be read.
    """
    with path.open("rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        lines = (chain.parse(raw) for raw in chain.backwards(handle, size) if raw.endswith(b"\n"))
        found = deque(islice((line.record for line in lines if line.record is not None), num_records))
    return list(found)[::-1]
