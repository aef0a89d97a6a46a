"""One living process a run: who trains into a folder holds its lock.

The lock is the system's own (``flock``, on Windows a locked byte) on ``<run>/.lock``, so that it ends with the
process however that dies, SIGKILL and power included: a stale file locks nobody out. The file tells who holds it.

The standard library is used directly: filelock falls back to a lock by mere existence where a file system has
none (which then outlives a killed run), and cannot ask without writing.

Where the file system has no locks, the process named in the file is looked for on this machine instead; one on
another machine is not seen there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from finitune.core.errors import UserError
from finitune.engine.codes import OUTPUT_UNUSABLE
from finitune.train.codes_runs import RUN_IN_USE

LOCK_FILE = ".lock"

# Somebody who asks (in_use) takes the lock for some microseconds; whoever wants to hold it tries again that long.
_PATIENCE_S = 0.3
_PAUSE_S = 0.01

_CONTENDED = {errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK}
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK}
_LONGEST_HOLDER_BYTES = 4096

# Descriptors of this process's locks: a forked child closes its copies, or it would hold the lock on after the
# parent's death.
_held: set[int] = set()

if sys.platform == "win32":  # pragma: no cover
    import msvcrt

    # Far behind the text: other processes may not read a locked byte.
    _LOCKED_BYTE = 1 << 30
    _ASK_S = 3 * _PAUSE_S  # two who ask at once are in each other's way

    def _take(descriptor: int, *, shared: bool) -> None:
        """Lock without waiting; raises OSError. There are no shared locks here."""
        del shared
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    _ASK_S = 0.0

    def _take(descriptor: int, *, shared: bool) -> None:
        """Lock without waiting; raises OSError."""
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def hold(run_dir: Path) -> Callable[[], None]:
    """Take the lock of a run without waiting.

    Returns:
        A function that gives the lock back and removes its file; a second call, and a call in a forked child, do
        nothing. Whoever never calls it holds the lock until the process ends.

    Raises:
        UserError: SYS030 where another living process (or this one) holds it; SYS004 where the folder cannot be
            written to.
    """
    path = run_dir / LOCK_FILE
    try:
        descriptor = _locked_descriptor(path)
    except OSError as error:
        raise UserError(OUTPUT_UNUSABLE, "output_dir", path=str(run_dir), error=str(error)) from error
    if descriptor is None:
        found = holder(run_dir)
        facts = {"pid": found.get("pid", "?"), "host": found.get("host", "?")}
        raise UserError(RUN_IN_USE, str(run_dir), path=str(run_dir), **facts)
    _sign(descriptor)
    return _giver_back(path, descriptor)


def in_use(run_dir: Path) -> bool:
    """Whether a living process holds the lock of a run. Leaves no trace; never raises OSError.

    False where that cannot be known: a lock file that may not be read.
    """
    try:
        descriptor = os.open(run_dir / LOCK_FILE, os.O_RDONLY | _FLAGS)
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return False
    try:
        return not _took(descriptor, shared=True, patience_s=_ASK_S)
    except OSError as error:
        return error.errno in _NO_LOCKS and _is_alive(_read(descriptor))
    finally:
        os.close(descriptor)


def holder(run_dir: Path) -> Mapping[str, Any]:
    """Who holds the lock, or held it last: "pid", "host", "time" (seconds since 1970); empty where unknown."""
    try:
        descriptor = os.open(run_dir / LOCK_FILE, os.O_RDONLY | _FLAGS)
    except (OSError, ValueError):
        return {}
    try:
        return _read(descriptor)
    finally:
        os.close(descriptor)


# No link is followed out of the folder, no pipe is waited for. (Descriptors of os.open are closed by exec.)
_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def _locked_descriptor(path: Path) -> int | None:
    """An open descriptor that has the lock; None where somebody else has it. Raises OSError."""
    end_s = time.monotonic() + _PATIENCE_S
    while True:
        with _opened(path) as descriptor:
            if not _took_or_has_none(descriptor, end_s - time.monotonic()):
                return None
            if _names(path, descriptor):
                _held.add(descriptor)
                return descriptor
        if time.monotonic() > end_s:  # the file changed under us all the time: somebody is busy with it
            return None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """An open lock file, closed on leaving unless it is held by then."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o666)
    try:
        yield descriptor
    finally:
        if descriptor not in _held:
            os.close(descriptor)


def _took_or_has_none(descriptor: int, patience_s: float) -> bool:
    """Whether we may go on: the lock is ours, or there are no locks and nobody seems to be alive."""
    try:
        return _took(descriptor, shared=False, patience_s=patience_s)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return not _is_alive(_read(descriptor))


def _took(descriptor: int, *, shared: bool, patience_s: float) -> bool:
    """Whether the lock was free. Raises OSError where there is none to take."""
    end_s = time.monotonic() + patience_s
    while True:
        try:
            _take(descriptor, shared=shared)
        except OSError as error:
            if error.errno not in _CONTENDED:
                raise
        else:
            return True
        if time.monotonic() >= end_s:
            return False
        time.sleep(_PAUSE_S)


def _names(path: Path, descriptor: int) -> bool:
    """Whether ``path`` is still this file: a holder that left removed it, and our lock would guard nothing."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Write who holds the lock. A full disk is no reason to give it up."""
    record = {"pid": os.getpid(), "host": socket.gethostname(), "time": round(time.time(), 3)}
    with contextlib.suppress(OSError):
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(record).encode())


def _read(descriptor: int) -> dict[str, Any]:
    """What :func:`_sign` wrote, with values of the right kind only."""
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        record = json.loads(os.read(descriptor, _LONGEST_HOLDER_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(record, dict):
        return {}
    kinds: dict[str, type | tuple[type, ...]] = {"pid": int, "host": str, "time": (int, float)}
    found = {name: record[name] for name, kind in kinds.items() if isinstance(record.get(name), kind)}
    if not found.get("host", "").isprintable():  # it is shown in a terminal
        del found["host"]
    return found


def _is_alive(found: Mapping[str, Any]) -> bool:
    """Whether the process of a lock file lives on this machine, and is older than the file's text."""
    import psutil

    if found.keys() != {"pid", "host", "time"} or found["host"] != socket.gethostname():
        return False
    try:
        return bool(psutil.Process(found["pid"]).create_time() <= found["time"] + 1.0)
    except (psutil.Error, ValueError, OverflowError):
        return False


def _giver_back(path: Path, descriptor: int) -> Callable[[], None]:
    owners = [os.getpid()]

    def give_back() -> None:
        # The number of a closed descriptor may be somebody else's by now: never close it twice.
        if not owners or owners.pop() != os.getpid():
            return
        # Removed while it is still locked: whoever opened it meanwhile sees that it is gone, and opens a new one.
        # Windows removes no open file; it stays there, and is locked again by the next run.
        with contextlib.suppress(OSError):
            if _names(path, descriptor):
                os.unlink(path)
        _held.discard(descriptor)
        with contextlib.suppress(OSError):
            os.close(descriptor)

    return give_back


def _forget_in_child() -> None:
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
