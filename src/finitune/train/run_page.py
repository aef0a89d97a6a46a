"""Everything a run folder tells of one run: its whole journal, its checkpoints looked at one by one."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from finitune.core import chain
from finitune.train.folder import FINAL, JOURNAL_FILE, SUMMARY_FILE
from finitune.train.run_ends import OPENINGS, Record, integer, real
from finitune.train.runs import ASIDE_PREFIXES, Run, State, faults_of, look, size_of

_LONGEST_LINE_BYTES = 16 << 20
_TIMED = {"step": "steps", "eval": "evaluation", "sample": "samples", "save": "saving"}
"""Kinds of records that are written when something is done, and what that was."""


@dataclass(slots=True)
class Page:
    """One run in full."""

    run: Run
    """With the faults of every checkpoint."""
    findings: Counter[str] = field(default_factory=Counter)
    """How often each code was found."""
    evals: dict[int, float] = field(default_factory=dict)
    """Held-out loss by step; of a step that was evaluated twice the later one."""
    sessions: list[Record] = field(default_factory=list)
    """The opening of each session: "start" or "resume"."""
    actions: Counter[str] = field(default_factory=Counter)
    """What was done with each transaction: "proceed", "skip_batch", ..."""
    times_s: dict[str, float] = field(default_factory=dict)
    """Seconds between journal lines by what the later line tells the end of; saves in the background overlap."""
    train_time_s: float = 0.0
    """Seconds inside of steps."""
    num_rollbacks: int = 0
    num_records: int = 0
    damage: list[chain.Damage] = field(default_factory=list)
    """Damaged places of the journal."""
    has_final: bool = False
    summary_fault: str = ""
    """Why summary.json cannot be read; empty where it can, or where there is none."""
    num_aside: int = 0
    """Checkpoints that were put aside: of a line the run has left by going back, or damaged."""
    aside_bytes: int = 0

    @property
    def derived(self) -> dict[str, str]:
        """What the newest session derived from the recipe: name and value."""
        found = self.sessions[-1].get("derived") if self.sessions else None
        return {k: str(v) for k, v in found.items()} if isinstance(found, Mapping) else {}

    @property
    def sound(self) -> bool:
        """Whether everything could be read, and neither the journal nor any checkpoint is damaged."""
        readable = self.run.state not in (State.UNREADABLE, State.DAMAGED)
        return readable and not self.damage and not any(c.faults for c in self.run.checkpoints)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able record (non-finite numbers are encoded by the printer)."""
        newest = self.sessions[-1] if self.sessions else {}
        return {
            **self.run.to_json(),
            "checkpoints": [{**c.to_json(), "eval_loss": self.evals.get(c.step)} for c in self.run.checkpoints],
            "findings": dict(sorted(self.findings.items())),
            "evals": [{"step": step, "loss": loss} for step, loss in sorted(self.evals.items())],
            "num_sessions": len(self.sessions),
            "started_time": real(self.sessions[0], "time") if self.sessions else None,
            "device": newest.get("device"),
            "versions": newest.get("versions"),
            "derived": self.derived,
            "actions": dict(self.actions),
            "times_s": self.times_s,
            "train_time_s": self.train_time_s,
            "num_rollbacks": self.num_rollbacks,
            "num_records": self.num_records,
            "num_damaged_lines": len(self.damage),
            "damage": [{"line": d.line, "reason": d.reason.name.lower()} for d in self.damage],
            "has_final": self.has_final,
            "summary_fault": self.summary_fault or None,
            "num_aside": self.num_aside,
            "aside_bytes": self.aside_bytes,
        }


def page_of(path: Path, *, verify: bool = False) -> Page:
    """Read a whole run; ``verify`` compares the digests of all files of all checkpoints, not only the sizes.

    Never raises OSError: what cannot be read is missing from the page, and the run's state says why.
    """
    run = look(path)
    checked = tuple(replace(c, faults=faults_of(c.path, digests=verify)) for c in run.checkpoints)
    page = Page(replace(run, checkpoints=checked))
    if run.state is not State.UNREADABLE:
        _read_journal(page, path / JOURNAL_FILE)
    page.has_final = os.path.isdir(path / FINAL)
    page.summary_fault = _summary_fault(path / SUMMARY_FILE)
    aside = list(_put_aside(path))
    page.num_aside, page.aside_bytes = len(aside), sum(map(size_of, aside))
    return page


def _read_journal(page: Page, path: Path) -> None:
    """Take in every record, and count the damaged places. Ends where the file cannot be read any further."""
    before_s: float | None = None
    with contextlib.suppress(OSError), path.open("rb") as handle:
        for item in chain.checked(_lines(handle)):
            if isinstance(item, chain.Damage):
                page.damage.append(item)
            elif isinstance(item["kind"], str):
                _take(page, item)
                before_s = _take_time(page, item, before_s)


def _lines(handle: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; one that is too long to be a record comes as a short one that is none."""
    while raw := handle.readline(_LONGEST_LINE_BYTES):
        whole = raw
        while len(raw) == _LONGEST_LINE_BYTES and not raw.endswith(b"\n"):
            raw, whole = handle.readline(_LONGEST_LINE_BYTES), b"too long\n"
        yield whole


def _take(page: Page, record: Record) -> None:
    page.num_records += 1
    kind = record["kind"]
    if kind in OPENINGS:
        page.sessions.append(record)
    elif kind == "finding":
        _count(page.findings, record)
    elif kind == "eval":
        step, loss = integer(record, "step"), real(record, "loss")
        if step is not None and loss is not None:
            page.evals[step] = loss
    elif kind == "step":
        page.actions[str(record.get("action"))] += 1
        page.train_time_s += _seconds(real(record, "time_s"))
        findings = record.get("findings")
        for finding in findings if isinstance(findings, list) else ():
            _count(page.findings, finding)
    page.num_rollbacks += kind == "rollback"


def _count(findings: Counter[str], record: Any) -> None:
    code = record.get("code") if isinstance(record, Mapping) else None
    if isinstance(code, str):
        findings[code] += 1


def _take_time(page: Page, record: Record, before_s: float | None) -> float | None:
    """Add the time since the line before; the time of this line. Nothing counts between two sessions."""
    now_s = real(record, "time")
    name = _TIMED.get(record["kind"], "rest")
    if now_s is not None and before_s is not None and record["kind"] not in OPENINGS:
        page.times_s[name] = page.times_s.get(name, 0.0) + _seconds(now_s - before_s)
    return now_s


def _seconds(value: float | None) -> float:
    """A duration that can be summed: clocks jump, and records may hold anything."""
    return value if value is not None and math.isfinite(value) and value > 0 else 0.0


def _summary_fault(path: Path) -> str:
    try:
        with path.open("rb") as handle:
            record = json.load(handle)
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, RecursionError) as error:
        return str(error) or type(error).__name__
    return "" if isinstance(record, dict) else "not a JSON object"


def _put_aside(path: Path) -> Iterator[Path]:
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith(ASIDE_PREFIXES):
                    yield Path(entry.path)
    except OSError:
        return
