"""Small journals with known bytes: the clock stands still."""

from __future__ import annotations

from pathlib import Path

import pytest

from finitune.core import journal as subject
from finitune.core.journal import Journal, read

NOW_S = 1_700_000_000.5


class StandingClock:
    """The journal's clock: the same records give the same bytes, and a pause is over when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        monkeypatch.setattr(subject, "time", self)

    def time(self) -> float:
        """Seconds since 1970."""
        return NOW_S

    def monotonic(self) -> float:
        """Seconds for pauses."""
        return self.now_s


def put(journal: Journal, first: int, last: int) -> None:
    """Write the step records ``first`` to ``last``."""
    for step in range(first, last + 1):
        journal.write("step", step=step, loss=2.5)


def steps(path: Path) -> list[int]:
    """The steps that can be read."""
    return [record["step"] for record in read(path)]


def undisturbed(folder: Path, last: int) -> bytes:
    """What the file holds after the steps 1 to ``last`` on a good disk."""
    journal = Journal(folder / f"undisturbed-{last}")
    put(journal, 1, last)
    journal.close()
    return journal.path.read_bytes()
