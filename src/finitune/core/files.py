"""Files that are whole or absent: atomic writes, atomic folders, digests and manifests.

A reader never sees half a file: content is written aside on the same file system, flushed to the
disk (``fsync``), and renamed into place; the directory entry is flushed too. Nothing is removed
before its replacement stands.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 20


def fsync_path(path: Path) -> None:
    """Flush a file or, where the platform allows it, a directory entry to the disk."""
    flags = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) if path.is_dir() else os.O_RDONLY
    try:
        descriptor = os.open(path, flags)
    except PermissionError:  # Windows cannot open a directory
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes) -> None:
    """Write ``content`` so that ``path`` holds the old bytes or all of the new ones. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    try:
        with aside.open("xb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise
    fsync_path(path.parent)


def _aside(path: Path, suffix: str = "tmp") -> Path:
    """A name beside ``path`` that nobody else uses. Not ``tempfile``: its files are private to the user, whatever
    the umask says.
    """
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.{suffix}")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    sha = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(_CHUNK_BYTES):
            sha.update(block)
    return sha.hexdigest()


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target``; on a clean exit it becomes ``target``.

    An existing ``target`` is replaced only after the new folder is complete and flushed. On any
    error the new folder is removed and ``target`` stays as it was. Raises OSError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(target)
    aside.mkdir()
    try:
        yield aside
        for path in aside.rglob("*"):
            fsync_path(path)
        fsync_path(aside)
        _swap_in(aside, target)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise_disk_error(error)
        raise
    fsync_path(target.parent)


_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def raise_disk_error(error: BaseException) -> None:
    """Raise OSError where ``error`` is a refusal of the disk in another library's words.

    safetensors and tokenizers are written in Rust and raise exceptions of their own, which end in the system's
    number: "No space left on device (os error 28)".
    """
    number = None if isinstance(error, OSError) else _OS_ERROR.search(str(error))
    if number is not None:
        raise OSError(int(number[1]), str(error)) from error


def _swap_in(aside: Path, target: Path) -> None:
    """Rename ``aside`` to ``target``; a folder cannot be renamed over a full one, so the old steps aside first."""
    if not target.exists():
        os.rename(aside, target)
        return
    old = _aside(target, "old")
    os.rename(target, old)
    try:
        os.rename(aside, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write ``manifest.json``: the facts, and size and digest of every other file in ``folder``."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    record = {"schema": 1, **facts, "files": files}
    write_atomic(folder / MANIFEST, json.dumps(record, indent=1, allow_nan=False).encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of ``folder``. Raises OSError where it is absent, ValueError where it is no manifest."""
    record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        raise ValueError(f"{folder / MANIFEST} is not a manifest")
    return record


def verify_manifest(folder: Path, beside: Collection[str] = ()) -> list[str]:  # noqa: ARG001
    """What is wrong with ``folder``, one sentence a file; empty when all sizes and digests agree."""
    try:
        files = read_manifest(folder)["files"]
    except (OSError, ValueError) as error:
        return [f"{MANIFEST}: {error}"]
    faults = []
    for name, facts in files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            faults.append(f"{name}: points outside the folder")
        elif not path.is_file():
            faults.append(f"{name}: missing")
        elif path.stat().st_size != facts["bytes"]:
            faults.append(f"{name}: {path.stat().st_size} bytes, expected {facts['bytes']}")
        elif file_digest(path) != facts["sha256"]:
            faults.append(f"{name}: content differs from its digest")
    return faults
