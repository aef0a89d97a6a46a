"""The journal: append-only JSON lines, the run's truth.

Each line is one record ``{"schema", "kind", "time", ...}``. JSON knows no NaN, so a non-finite float
is written as the string "NaN", "Infinity" or "-Infinity" and :func:`number` reads it back: nothing is
hidden and every line stays strict JSON. A torn last line (a killed run) is tolerated by the reader.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SCHEMA = 1


def encode(value: Any) -> Any:
    """``value`` with every non-finite float spelled out, and tuples and mappings made JSON-able."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(v) for v in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return str(value)


def number(value: Any) -> float:
    """A number of a record as a float; "NaN", "Infinity" and "-Infinity" are understood."""
    return math.nan if value is None else float(value)


class Journal:
    """Appends records to one file. Every record is handed to the system before ``write`` returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        _mend_torn_end(path)
        self._handle = path.open("a", encoding="utf-8")

    def write(self, kind: str, **record: Any) -> None:
        """Append one record of ``kind``. Raises OSError (disk full) with the file left readable."""
        line = {"schema": SCHEMA, "kind": kind, "time": round(time.time(), 3), **record}
        self._handle.write(json.dumps(encode(line), ensure_ascii=False, allow_nan=False) + "\n")
        self._handle.flush()

    def sync(self) -> None:
        """Flush to the disk itself (at checkpoints and at the end)."""
        os.fsync(self._handle.fileno())

    def close(self) -> None:
        """Flush and close; further writes raise ValueError."""
        if not self._handle.closed:
            self.sync()
            self._handle.close()


def _mend_torn_end(path: Path) -> None:
    """End a torn last line, so that the next record starts on a line of its own."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as handle:
        handle.seek(-1, os.SEEK_END)
        if handle.read(1) != b"\n":
            handle.write(b"\n")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a journal, also while it is being written; lines that are torn are passed over."""
    with path.open("rb") as handle:
        for raw in handle:
            try:
                record = json.loads(raw)
            except ValueError:
                continue
            if isinstance(record, dict) and "kind" in record:
                yield record
