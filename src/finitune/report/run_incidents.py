"""The incidents of a run, from its journal and its folder ``incidents/``; also while it is being written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finitune.core import journal
from finitune.core.incident import Incident
from finitune.report.incident_words import clean

JOURNAL_FILE = "journal.jsonl"
_MAX_FILE_BYTES = 16 << 20
_NO_INCIDENT = (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True, slots=True)
class Incidents:
    """What a run tells of its incidents."""

    found: tuple[Incident, ...]
    """By number."""
    damage: tuple[str, ...]
    """Places that could not be read, one sentence each."""

    @property
    def unsettled(self) -> bool:
        """One is open, halted the run, or was only observed."""
        return any(i.outcome not in ("cured", "passed", "skipped") for i in self.found)


def incidents_of(run_dir: Path) -> Incidents:
    """All incidents of a run. The journal's word counts; what it does not tell comes from the folder.

    Raises OSError where the journal is there and cannot be read.
    """
    damage: list[str] = []
    found = {i.number: i for i in _in_folder(run_dir / "incidents", damage)}
    path = run_dir / JOURNAL_FILE
    if os.path.isfile(path):
        found |= {i.number: i for i in _in_journal(path, damage)}
    return Incidents(tuple(found[n] for n in sorted(found)), tuple(damage))


def _in_journal(path: Path, damage: list[str]) -> list[Incident]:
    found: list[Incident] = []
    for record in journal.read_checked(path):
        if isinstance(record, journal.Damage):
            damage.append(f"{path.name}: {record}")
        elif record.get("kind") == "incident":
            _take(record.get("incident"), f"{path.name} (incident)", found, damage)
    return found


def _in_folder(folder: Path, damage: list[str]) -> list[Incident]:
    found: list[Incident] = []
    try:
        names = sorted(os.listdir(folder))
    except OSError:  # there is none
        return found
    for path in (folder / name / "incident.json" for name in names):
        if not os.path.isfile(path):
            continue
        name = clean(f"incidents/{path.parent.name}/{path.name}")
        try:
            if path.stat().st_size > _MAX_FILE_BYTES:
                raise ValueError(f"more than {_MAX_FILE_BYTES} bytes")
            record = json.loads(path.read_bytes().decode("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            damage.append(f"{name}: {clean(str(error))[:200]}")
            continue
        _take(record, name, found, damage)
    return found


def _take(record: Any, name: str, found: list[Incident], damage: list[str]) -> None:
    """Add what is an incident."""
    try:
        if not isinstance(record, Mapping):
            raise TypeError("not a table")
        found.append(Incident.from_json(record))
    except _NO_INCIDENT as error:
        damage.append(f"{name}: {type(error).__name__}: {clean(str(error))[:200]}")
