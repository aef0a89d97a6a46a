"""A table of all scalars: ``metrics.csv`` with one row a value (step, name, value), for any spreadsheet."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

FILE = "metrics.csv"


class Tracker:
    """Appends rows; each row reaches the file before ``log`` returns."""

    def __init__(self, run_dir: Path) -> None:
        path = run_dir / FILE
        new = not path.exists()
        self._handle = path.open("a", encoding="utf-8", newline="")
        self._writer = csv.writer(self._handle)
        if new:
            self._writer.writerow(("step", "name", "value"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the scalars of one step; NaN and inf are written as such."""
        self._writer.writerows((step, name, repr(float(value))) for name, value in values.items())
        self._handle.flush()

    def close(self) -> None:
        """Close the file."""
        self._handle.close()
