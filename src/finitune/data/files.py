"""Which files a recipe means, and whether they can be read at all. Every fault is one clear UserError."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from finitune.core.errors import UserError
from finitune.core.messages.catalogue import text
from finitune.data.codes import BINARY_FILE, EMPTY_FILE, IS_DIRECTORY, MISSING_FILE, UNKNOWN_TYPE, UNREADABLE

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".txt")
STDLIB = "finitune:stdlib"
"""Name of the built-in source: questions about the standard library, answered by its docstrings."""

# First bytes of what is often given by mistake (file(1) magic numbers).
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "gzip"),
    (b"PK\x03\x04", "zip"),
    (b"\x28\xb5\x2f\xfd", "compressed"),
    (b"BZh", "compressed"),
    (b"\xfd7zXZ\x00", "compressed"),
    (b"7z\xbc\xaf\x27\x1c", "compressed"),
    (b"PAR1", "parquet"),
    (b"\xff\xfe", "utf16"),
    (b"\xfe\xff", "utf16"),
    (b"\x89PNG", "image"),
    (b"\xff\xd8\xff", "image"),
    (b"%PDF", "pdf"),
    (b"\x80\x04\x95", "pickle"),
    (b"\x80\x05\x95", "pickle"),
)
_HEAD_BYTES = 8192


@dataclass(frozen=True, slots=True)
class Source:
    """One file to read (or ``finitune:stdlib``)."""

    path: str
    format: str = "auto"
    """Name of a data format, or "auto": recognised by the columns."""
    unit: str = "line"
    """What one document of a .txt file is: "line" or "file"."""


def expand(sources: str | Path | Source | Sequence[str | Path | Source] | Mapping[str, str]) -> list[Source]:
    """Sources in the order given, with patterns (``*.jsonl``) replaced by the files they match, sorted.

    A mapping gives each path or pattern its format. A pattern without a match stays as it is, to be
    reported as missing.
    """
    if isinstance(sources, Mapping):
        given = [Source(str(path), name) for path, name in sources.items()]
    elif isinstance(sources, (str, Path, Source)):
        given = [_as_source(sources)]
    else:
        given = [_as_source(s) for s in sources]
    return [found for source in given for found in _matches(source)]


def _as_source(source: str | Path | Source) -> Source:
    return source if isinstance(source, Source) else Source(str(source))


def _matches(source: Source) -> list[Source]:
    if not any(c in source.path for c in "*?[") or Path(source.path).exists():
        return [source]
    names = sorted(n for n in glob.glob(source.path, recursive=True) if Path(n).is_file())
    return [Source(name, source.format, source.unit) for name in names] or [source]


def check_file(path: str) -> UserError | None:
    """The fault that keeps a file from being read, if any."""
    place = Path(path)
    try:
        if place.is_dir():
            return _directory(place)
        if not place.exists():
            return UserError(MISSING_FILE, path, path=path, hint=_near_names(place))
        size = place.stat().st_size
        if size == 0:
            return UserError(EMPTY_FILE, path, path=path, size_bytes=0)
        with place.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except OSError as error:
        return UserError(UNREADABLE, path, path=path, reason=error.strerror or str(error))
    return _check_head(place, head)


def _check_head(place: Path, head: bytes) -> UserError | None:
    path, suffix = str(place), place.suffix.lower()
    kind = _binary_kind(head)
    if kind and not (kind == "parquet" and suffix == ".parquet"):
        words = {"kind": text(f"data.kind.{kind}"), "cure": text(f"data.cure.{kind}")}
        return UserError(BINARY_FILE, path, path=path, **words)
    if suffix not in SUFFIXES:
        return UserError(UNKNOWN_TYPE, path, path=path, suffix=place.suffix, known=", ".join(SUFFIXES))
    return None


def _binary_kind(head: bytes) -> str:
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    return "binary" if b"\0" in head else ""


def _directory(place: Path) -> UserError:
    names = sorted(p.name for p in place.iterdir() if p.suffix.lower() in SUFFIXES)
    return UserError(
        IS_DIRECTORY,
        str(place),
        path=place.as_posix().rstrip("/"),
        num_files=len(names),
        files=shorten(names),
    )


def _near_names(place: Path) -> str:
    """Close names in the same folder; if the folder itself is wrong, close folders."""
    missing = place
    while not missing.parent.is_dir() and missing.parent != missing:
        missing = missing.parent
    here = {p.name.lower(): p.name for p in missing.parent.iterdir()}
    near = [here[n] for n in get_close_matches(missing.name.lower(), here, n=3, cutoff=0.5)]
    if not near and missing == place:
        near = sorted(n for n in here.values() if Path(n).suffix.lower() in SUFFIXES)[:3]
    rest = place.relative_to(missing)
    shown = [(missing.parent / n / rest if (missing.parent / n / rest).exists() else missing.parent / n) for n in near]
    return text("data.did_you_mean", names=", ".join(s.as_posix() for s in shown)) if near else ""


def shorten(names: Sequence[str], limit: int = 8) -> str:
    """Names in one line; the count of those left out."""
    if not names:
        return text("data.none")
    shown = ", ".join(names[:limit])
    left = len(names) - limit
    return f"{shown} ({text('data.more', count=left)})" if left > 0 else shown


def file_digest(path: str | Path) -> str:
    """SHA-256 of the whole file, as hex."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
