"""Records of cases on disk: JSON lines, appended as they come, so that a bench that was stopped goes on.

A record counts only for the sources that made it: after any change of the package a case is run again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from finitune.core.journal import encode

FILE = "records.jsonl"


@cache
def sources_digest() -> str:
    """12 hex digits of SHA-256 over the package's Python files and their names."""
    root = Path(__file__).resolve().parents[1]
    whole = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        whole.update(f"{path.relative_to(root).as_posix()}\0".encode())
        whole.update(path.read_bytes())
    return whole.hexdigest()[:12]


class Store:
    """The records in one folder."""

    def __init__(self, folder: Path, sources: str) -> None:
        """Raises OSError where the folder cannot be made."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.sources = folder / FILE, sources
        self._records = {r["key"]: r for r in read_records(self.path) if r.get("sources") == sources}

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def add(self, record: dict[str, Any]) -> None:
        """Keep a record; a later one of the same case replaces it. Raises OSError."""
        whole = encode({**record, "sources": self.sources})
        line = json.dumps(whole, ensure_ascii=False, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(line + "\n")
        self._records[record["key"]] = json.loads(line)

    def of(self, keys: Iterable[str]) -> list[dict[str, Any]]:
        """The records of these cases, in this order; missing ones are left out."""
        return [self._records[key] for key in keys if key in self._records]


def read_records(path: Path) -> list[dict[str, Any]]:
    """All whole records of a file; torn or foreign lines are left out. Empty where there is no file."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("key"), str):
            found.append(record)
    return found
