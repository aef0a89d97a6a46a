"""The bench as a whole: cases -> workers -> records -> score, tables, picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finitune.bench.cases import OURS, Case
from finitune.bench.picture import svg
from finitune.bench.pool import run_all
from finitune.bench.score import Record, whole
from finitune.bench.store import Store, sources_digest
from finitune.bench.tables import commit, markdown, today, versions
from finitune.core.files import write_atomic

JSON, MARKDOWN, SVG = "faultbench.json", "faultbench.md", "faultbench.svg"
Told = Callable[[int, int, Record], None]


@dataclass(frozen=True, slots=True)
class Benched:
    """What a bench came to."""

    score: dict[str, Any]
    records: list[Record]
    files: tuple[Path, ...]


def bench(cases: Sequence[Case], folder: Path, jobs: int, command: str, told: Told, *, fresh: bool = False) -> Benched:
    """Run what has no record yet, and write the score. ``told(done, all, record)`` after each case.

    Raises OSError where the folder cannot be written.
    """
    store = Store(folder, sources_digest())
    due = [c for c in cases if fresh or c.key not in store]
    done = len(cases) - len(due)
    # Times are compared where nothing else runs.
    for group, width in ((_timed(due), 1), (_untimed(due), jobs)):
        for record in run_all(group, width):
            store.add(record)
            done += 1
            told(done, len(cases), record)
    records = store.of(c.key for c in cases)
    return Benched(score := _score(records, command), records, _write(folder, score, records, command))


def _timed(cases: Sequence[Case]) -> list[Case]:
    return [c for c in cases if c.kind == "overhead"]


def _untimed(cases: Sequence[Case]) -> list[Case]:
    return [c for c in cases if c.kind != "overhead"]


def _score(records: Sequence[Record], command: str) -> dict[str, Any]:
    made = {"command": command, "date": today(), "commit": commit(), "versions": versions()}
    return {"schema": 1, "made": made, **whole(records, OURS)}


def _write(folder: Path, score: dict[str, Any], records: Sequence[Record], command: str) -> tuple[Path, ...]:
    texts = {
        JSON: json.dumps(score, indent=1, ensure_ascii=False, sort_keys=False, allow_nan=False) + "\n",
        MARKDOWN: markdown(records, OURS, command),
        SVG: svg(records),
    }
    for name, text in texts.items():
        write_atomic(folder / name, text.encode())
    return tuple(folder / name for name in texts)
