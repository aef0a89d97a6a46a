"""What lies in a folder, looked at without trusting it: no link is followed out of it, nothing special is opened,
and what could hold code or a pickle is named.

Nothing here is ever unpickled or run, so this is a second lock: a checkpoint may be passed on, and what a stranger has
put into it shall not lie ready for the next tool that is less careful.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from finitune.core.messages.catalogue import text

ALLOWED_SUFFIXES = frozenset(
    (
        *(".safetensors", ".gguf", ".parquet"),
        *(".json", ".jsonl", ".txt", ".md", ".csv", ".yaml", ".yml", ".jinja"),
        *(".model", ".vocab", ".merges", ".bpe", ".spm", ".tiktoken", ".codes"),
    )
)
"""Weights without code, text, and what tokenizers are made of."""
# File managers put them anywhere; no tool of ours or others loads them.
_LITTER = frozenset((".DS_Store", "Thumbs.db", "desktop.ini"))

# How files begin that are programs or may hold a pickle (https://docs.python.org/3/library/pickletools.html;
# torch.save writes a zip, or before 1.6 a pickle; joblib and tar balls come compressed). Named in messages/*/files.py.
_MAGIC: tuple[tuple[str, re.Pattern[bytes]], ...] = (
    ("files.pickle", re.compile(rb"\x80[\x02-\x05]")),
    ("files.zip", re.compile(rb"PK(\x03\x04|\x05\x06|\x07\x08)")),
    ("files.numpy", re.compile(rb"\x93NUMPY")),
    ("files.compressed", re.compile(rb"\x1f\x8b|BZh[1-9]1AY|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf")),
    ("files.program", re.compile(rb"\x7fELF|MZ[^\t\n\r -~]|#!|\x00asm")),
    ("files.program", re.compile(rb"[\xce\xcf]\xfa\xed\xfe|\xfe\xed\xfa[\xce\xcf]|\xca\xfe\xba\xbe")),
)
_HEAD_BYTES = 16
# safetensors refuses larger headers (huggingface/safetensors: safetensors/src/tensor.rs, MAX_HEADER_SIZE).
_MAX_HEADER_BYTES = 100_000_000


def shown(name: str) -> str:
    """A file's name for a message: control characters and bytes that are no text are escaped."""
    return name if name.isprintable() else ascii(name)


def walk(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The plain files below ``folder`` by their relative names (with "/"), and what else lies there, one sentence each.

    A link to a file inside of the folder counts as that file.
    """
    files: dict[str, Path] = {}
    faults: list[str] = []
    for base, folders, names in os.walk(folder, onerror=lambda e: faults.append(_unreadable(folder, e))):
        for name in folders:
            if os.path.islink(path := Path(base, name)):
                faults.append(text("files.link", name=shown(path.relative_to(folder).as_posix())))
        for name in names:
            path = Path(base, name)
            relative = path.relative_to(folder).as_posix()
            fault = _fault_of(path, folder)
            if fault is None:
                files[relative] = path
            else:
                faults.append(text(fault, name=shown(relative)))
    return files, faults


def _unreadable(folder: Path, error: OSError) -> str:
    name = Path(error.filename).relative_to(folder).as_posix()
    return text("files.unreadable", name=shown(name), error=error.strerror)


def _fault_of(path: Path, folder: Path) -> str | None:
    """The key of what is wrong with an entry that is no folder; None for a file."""
    try:
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            return "files.outside"
        mode = path.stat().st_mode
    except (OSError, RuntimeError):  # a link to nothing, or to itself
        return "files.broken"
    return None if stat.S_ISREG(mode) else "files.special"


def suspicion(name: str, path: Path) -> str | None:
    """Why a file could hold code or a pickle, as a sentence; None where nothing speaks for it.

    Raises OSError where it cannot be read.
    """
    suffix = Path(name).suffix.lower()
    if suffix not in ALLOWED_SUFFIXES and Path(name).name not in _LITTER:
        return text("files.suffix", name=shown(name))
    with path.open("rb") as handle:
        head = handle.read(_HEAD_BYTES)
    if suffix == ".safetensors" and _is_safetensors(head):
        return None
    what = next((what for what, magic in _MAGIC if magic.match(head)), None)
    return None if what is None else text("files.content", name=shown(name), what=text(what))


def is_litter(name: str) -> bool:
    """Whether a file manager has put the file there."""
    return Path(name).name in _LITTER


def _is_safetensors(head: bytes) -> bool:
    """Whether a file begins with a JSON header of a length that it can have.

    The length comes first, and that of a header of 640 bytes looks like the start of a pickle. It is none: the zeros
    that follow in any such length are no pickle's instruction.
    """
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER_BYTES
