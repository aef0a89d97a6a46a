"""Files that are whole or absent: atomic writes, atomic folders, digests and manifests.

A reader never sees half a file: content is written aside on the same file system, flushed to the
disk (``fsync``), and renamed into place; the directory entry is flushed too. Nothing is removed
before its replacement stands. What a killed writer leaves behind is told by its name, and :func:`sweep` mends it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from finitune.core import contents
from finitune.core.messages.catalogue import text

MANIFEST = "manifest.json"
_SCHEMA = 2
_CHUNK_BYTES = 1 << 20
# The manifest of a folder of 100 000 files; more is no manifest.
_MAX_MANIFEST_BYTES = 16 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ASIDE = re.compile(r"\.(?P<name>.+)\.\d+-[0-9a-f]{8}\.(?P<kind>tmp|old)", re.DOTALL)

_BINARY = getattr(os, "O_BINARY", 0)
# Windows flushes only what was opened for writing.
_FSYNC_FLAGS = os.O_RDWR | _BINARY if os.name == "nt" else os.O_RDONLY
# File systems that cannot flush a folder say so in these ways; they order its entries by themselves.
_NO_FOLDER_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}


def fsync_path(path: Path) -> None:
    """Flush a file or, where the platform allows it, a directory entry to the disk. Raises OSError."""
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) if is_folder else _FSYNC_FLAGS)
    except PermissionError:
        if is_folder:  # Windows opens none; elsewhere a folder may be writable but not readable
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in _NO_FOLDER_FSYNC:
            raise
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes) -> None:
    """Write ``content`` so that ``path`` holds the old bytes or all of the new ones.

    Raises OSError: the old content stands; or, where only the last flush of the folder's entry was refused, the new
    one stands whole, but it is not certain to outlive a power cut. Writing again is always right.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    try:
        _write_flushed(aside, content)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise
    fsync_path(path.parent)


def _write_flushed(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
    try:
        view = memoryview(content)
        while view:
            view = view[_written(os.write(descriptor, view[:_CHUNK_BYTES]), path) :]
        os.fsync(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise
    os.close(descriptor)  # network file systems tell here what they could not store


def _written(count: int, path: Path) -> int:
    if count <= 0:
        raise OSError(errno.EIO, "the system took no byte", str(path))
    return count


def _aside(path: Path, suffix: str = "tmp") -> Path:
    """A name beside ``path`` that nobody else uses. Not ``tempfile``: its files are private to the user, whatever
    the umask says.
    """
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.{suffix}")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal. Raises OSError."""
    sha = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(_CHUNK_BYTES):
            sha.update(block)
    return sha.hexdigest()


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target``; on a clean exit it becomes ``target``.

    An existing ``target`` (folder, file or link) is replaced only after the new folder is complete and flushed. On any
    error the new folder is removed and ``target`` stays as it was, with two exceptions:

    - Only the last flush of the parent's entry was refused: the new folder stands whole, but it is not certain to
      outlive a power cut.
    - The disk refuses the swap, and then to put the old one back: it is whole under the name ``.NAME.PID-HEX.old``,
      and :func:`sweep` puts it back.

    Raises OSError, whatever the exception of the library that the disk has refused; writing again is always right.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(target)
    aside.mkdir()
    try:
        yield aside
        for path in aside.rglob("*"):
            fsync_path(path)
        fsync_path(aside)
        old = _swap_in(aside, target)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise_disk_error(error)
        raise
    try:
        # First the new one's name is on the disk, then the old content goes.
        fsync_path(target.parent)
    finally:
        if old is not None:
            with contextlib.suppress(OSError):
                _remove(old)


_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def raise_disk_error(error: BaseException) -> None:
    """Raise OSError where ``error`` is a refusal of the disk in another library's words.

    safetensors and tokenizers are written in Rust and raise exceptions of their own, which end in the system's
    number: "No space left on device (os error 28)".
    """
    number = None if isinstance(error, OSError) else _OS_ERROR.search(str(error))
    if number is not None:
        raise OSError(int(number[1]), str(error)) from error


def _swap_in(aside: Path, target: Path) -> Path | None:
    """Rename ``aside`` to ``target``; a folder cannot be renamed over a full one, so the old steps aside first.

    Returns where the old one is.
    """
    if not os.path.lexists(target):
        os.rename(aside, target)
        return None
    old = _aside(target, "old")
    os.rename(target, old)
    try:
        os.rename(aside, target)
    except BaseException:
        os.rename(old, target)
        raise
    return old


def _remove(path: Path) -> None:
    """Remove a file, a link (never what it leads to) or a folder with all that is in it. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        os.unlink(path)


def remove_folder(path: Path) -> None:
    """Remove a folder so that a reader finds it whole or not at all; killed half-way, :func:`sweep` does the rest.

    Raises OSError where it cannot be renamed; what cannot be removed after that stays under the other name.
    """
    aside = _aside(path)
    os.rename(path, aside)
    _remove(aside)


def sweep(folder: Path) -> list[str]:
    """Mend what killed writers have left in ``folder`` itself; what was done, one sentence each.

    Half-written files and folders (``.NAME.PID-HEX.tmp``) are removed. Of an interrupted swap the old one
    (``.NAME.PID-HEX.old``) is put back where NAME is absent, and removed where it stands. Nothing else is touched.

    Only for whoever holds the run's lock: a living writer's work looks the same. Raises nothing; what cannot be
    removed is said.
    """
    done: list[str] = []
    for path, name in _left_behind(folder, "old"):
        if os.path.lexists(folder / name):
            done.append(_swept(path))
        else:
            done.append(_put_back(path, folder / name))
    done.extend(_swept(path) for path, _ in _left_behind(folder, "tmp"))
    if done:
        with contextlib.suppress(OSError):
            fsync_path(folder)
    return done


def _left_behind(folder: Path, kind: str) -> list[tuple[Path, str]]:
    """What killed writers have left, newest first, and the name it was meant for."""
    try:
        named = [(path, _ASIDE.fullmatch(path.name)) for path in folder.iterdir()]
        found = [(path, match["name"]) for path, match in named if match and match["kind"] == kind]
        return sorted(found, key=lambda f: f[0].lstat().st_ctime_ns, reverse=True)
    except OSError:
        return []


def _swept(path: Path) -> str:
    try:
        _remove(path)
    except OSError as error:
        return text("files.stays", name=contents.shown(path.name), error=str(error.strerror))
    return text("files.swept", name=contents.shown(path.name))


def _put_back(path: Path, target: Path) -> str:
    try:
        os.rename(path, target)
    except OSError as error:
        return text("files.stays", name=contents.shown(path.name), error=str(error.strerror))
    return text("files.mended", name=contents.shown(target.name))


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write ``manifest.json``: the facts, size and digest of every other file in ``folder``, and its own digest.

    ``facts`` are JSON values under other names than "schema", "files" and "self". Raises OSError, and ValueError
    where there is something in ``folder`` that is no plain file.
    """
    assert not {"schema", "files", "self"} & facts.keys()
    present, faults = contents.walk(folder)
    if faults:
        raise ValueError("; ".join(faults))
    files = {
        name: {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for name, path in sorted(present.items())
        if name != MANIFEST
    }
    record: dict[str, Any] = {"schema": _SCHEMA, **facts, "files": files}
    record["self"] = _self_digest(record)
    write_atomic(folder / MANIFEST, json.dumps(record, indent=1, allow_nan=False).encode())


def _self_digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its field "self", as JSON with sorted keys and without spaces."""
    rest = {key: value for key, value in record.items() if key != "self"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of ``folder``, which agrees with its own digest (schema 1 had none).

    Raises OSError where it is absent or unreadable, ValueError where it is no manifest or was changed.
    """
    path = folder / MANIFEST
    if not path.is_file():  # also what would block, as a pipe
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if (size := path.stat().st_size) > _MAX_MANIFEST_BYTES:
        raise ValueError(text("files.too_long", actual=size))
    return _manifest_of(path.read_bytes())


def _manifest_of(written: bytes) -> dict[str, Any]:
    """The manifest that was written. Raises ValueError where it is none, or was changed."""
    try:
        record = json.loads(written.decode("utf-8"))
        digest = _self_digest(record) if isinstance(record, dict) else ""
    except (ValueError, RecursionError) as error:
        raise ValueError(text("files.not_json", error=str(error))) from error
    _check_shape(record)
    if record["schema"] == _SCHEMA and record.get("self") != digest:
        raise ValueError(text("files.changed"))
    return dict(record)


def _check_shape(record: Any) -> None:
    """Raise ValueError where a manifest is none, or of a schema that is not known."""
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict) or "schema" not in record:
        raise ValueError(text("files.no_manifest"))
    if type(record["schema"]) is not int or record["schema"] not in (1, _SCHEMA):
        raise ValueError(text("files.schema", schema=repr(record["schema"])))
    for name, facts in record["files"].items():
        size, digest = (facts.get("bytes"), facts.get("sha256")) if isinstance(facts, dict) else (None, None)
        if type(size) is not int or size < 0 or not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise ValueError(text("files.bad_entry", entry=contents.shown(name)))


def verify_manifest(folder: Path, beside: Collection[str] = ()) -> list[str]:
    """What is wrong with ``folder``, one sentence a fault; empty when all is as it was written. Never raises.

    Found are: a manifest that is absent, torn or changed; files that are missing, cut short, changed, not listed
    (but those named in ``beside``), or could hold code or a pickle, listed or not; links that leave the folder.
    """
    present, faults = contents.walk(folder)
    faults += [fault for name, path in present.items() if (fault := _suspicion(name, path, beside)) is not None]
    try:
        files = read_manifest(folder)["files"]
    except FileNotFoundError:
        return [text("files.missing", name=MANIFEST), *faults]
    except (OSError, ValueError) as error:
        return [text("files.bad_manifest", name=MANIFEST, reason=str(error)), *faults]
    for name, facts in files.items():
        fault = _fault_of(name, present.get(name), facts)
        if fault is not None:
            faults.append(fault)
    known = {MANIFEST, *beside, *files}
    strangers = (name for name in present if name not in known and not _is_harmless(name, beside))
    return faults + [text("files.foreign", name=contents.shown(name)) for name in strangers]


def _suspicion(name: str, path: Path, beside: Collection[str]) -> str | None:
    try:
        # Half of a file that belongs here still is named as one that is written.
        meant = m["name"] if (m := _ASIDE.fullmatch(name)) and m["name"] in (MANIFEST, *beside) else name
        return contents.suspicion(meant, path)
    except OSError as error:
        return text("files.unreadable", name=contents.shown(name), error=str(error.strerror))


def _fault_of(name: str, path: Path | None, facts: Mapping[str, Any]) -> str | None:
    """What is wrong with a listed file; its name is looked up among those present, never opened as it stands."""
    shown = contents.shown(name)
    if path is None:
        pure = PurePosixPath(name)
        return text("files.outside" if pure.is_absolute() or ".." in pure.parts else "files.missing", name=shown)
    try:
        if (size := path.stat().st_size) != facts["bytes"]:
            return text("files.size", name=shown, actual=size, expected=facts["bytes"])
        return None if file_digest(path) == facts["sha256"] else text("files.digest", name=shown)
    except OSError as error:
        return text("files.unreadable", name=shown, error=str(error.strerror))


def _is_harmless(name: str, beside: Collection[str]) -> bool:
    """A file manager's litter, or half of a file that is allowed here: its writer was killed."""
    half = _ASIDE.fullmatch(name)
    return contents.is_litter(name) or (half is not None and half["name"] in (MANIFEST, *beside))
