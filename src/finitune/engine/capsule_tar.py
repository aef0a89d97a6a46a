"""A plain .tar with a capsule in it, unpacked without trust: plain files under short plain names, and nothing else."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path, PurePosixPath

from finitune.core.contents import shown
from finitune.core.errors import UserError
from finitune.core.messages.catalogue import text
from finitune.engine.codes_incident import CAPSULE_UNSAFE, NO_CAPSULE

_MAX_MEMBERS = 64
_MAX_PARTS = 4
_MAX_NAME_CHARS = 200
_MAX_BYTES = 64 << 30
_FORBIDDEN = frozenset('\\:*?"<>|')
"""What leads elsewhere, or cannot be, on some systems."""


def unpacked(archive: Path, target: Path, name: str) -> None:
    """Unpack ``archive`` into the empty folder ``target``.

    A compressed archive is refused: what it unpacks to cannot be told from its size.

    Raises UserError SYS410 for what is no plain tar, SYS414 for what must not be in one; OSError.
    """
    if archive.stat().st_size > _MAX_BYTES:
        problem = text("incidents.too_large", name=name, actual=archive.stat().st_size, limit=_MAX_BYTES)
        raise UserError(CAPSULE_UNSAFE, name, path=name, problem=problem)
    try:
        with tarfile.open(archive, mode="r:") as opened:
            _take(opened, target, name)
    except (tarfile.TarError, EOFError, OverflowError, ValueError, KeyError) as error:
        raise UserError(
            NO_CAPSULE, name, path=name, reason=text("incidents.no_tar", error=shown(str(error)))
        ) from error


def _take(opened: tarfile.TarFile, target: Path, name: str) -> None:
    for count, member in enumerate(opened, 1):
        problem = _fault_of(member, target) if count <= _MAX_MEMBERS else text("incidents.members", limit=_MAX_MEMBERS)
        if problem is not None:
            raise UserError(CAPSULE_UNSAFE, name, path=name, problem=problem)
        if member.isdir():
            continue
        path = target.joinpath(*PurePosixPath(member.name).parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = opened.extractfile(member)
        assert content is not None, "it is a file"
        with content, path.open("xb") as out:
            shutil.copyfileobj(content, out)


def _fault_of(member: tarfile.TarInfo, target: Path) -> str | None:
    """Why a member is refused; None for a plain file, or a folder, that may be unpacked."""
    name, parts = member.name, PurePosixPath(member.name).parts
    data = {"name": shown(name[:_MAX_NAME_CHARS])}
    if not parts and member.isdir():  # ".", the folder itself
        return None
    if PurePosixPath(name).is_absolute() or ".." in parts or not parts:
        return text("incidents.outside", **data)
    if len(parts) > _MAX_PARTS or len(name) > _MAX_NAME_CHARS or not name.isprintable() or _FORBIDDEN & set(name):
        return text("incidents.odd_name", **data)
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        return text("incidents.no_file", **data)
    return text("incidents.twice", **data) if target.joinpath(*parts).exists() else None
