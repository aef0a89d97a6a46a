"""What a bare run keeps: the newest records in memory, and with a folder also journal, incidents and capsules."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from finitune.adapters.bare import BarePort
from finitune.adapters.bare_capsule import with_script
from finitune.core.errors import Halted
from finitune.core.incident import Incident
from finitune.core.journal import Journal
from finitune.engine.capsule import FOLDER, CapsuleOptions, incident_folder, write_capsule, write_incident
from finitune.engine.capture import capture
from finitune.engine.case import Case
from finitune.engine.codes import JOURNAL_LOST
from finitune.engine.codes_incident import CAPSULE_NOT_WRITTEN
from finitune.engine.conditions import NotPossible
from finitune.engine.line import treated
from finitune.engine.policy import Action
from finitune.engine.snapshot import Snapshot

JOURNAL_FILE = "journal.jsonl"
_MAX_RECORDS = 8192
# What the time machine reads of a step; the rest is for the file.
_OF_A_STEP = ("attempt", "step", "loss", "grad_norm", "lr", "loss_scale", "verdict", "action", "findings")


class Keep:
    """Records and files of one guarded loop."""

    def __init__(self, port: BarePort, run_dir: Path | None, options: CapsuleOptions | None = None) -> None:
        """``options``: what goes into capsules."""
        self.port, self.run_dir, self.options = port, run_dir, options
        self._records: deque[Mapping[str, Any]] = deque(maxlen=_MAX_RECORDS)
        self.journal = Journal(run_dir / JOURNAL_FILE) if run_dir is not None else None
        record = port.state_record()
        self.record("start", step=0, attempt=0, treated=treated(record), facts=dict(port.facts()))

    @property
    def place(self) -> str:
        """Where the records are, for messages."""
        return "memory" if self.journal is None else str(self.journal.path)

    def records(self) -> Iterable[Mapping[str, Any]]:
        """The newest records of the run, oldest first."""
        return list(self._records)

    def record(self, kind: str, **fields: Any) -> None:
        """Take a record. Raises Halted where the disk refuses: nothing may happen unrecorded."""
        if kind == "step" and fields["action"] != Action.PROCEED.value and not fields["rows"]:
            fields["rows"] = [str(r) for r in self._rows(int(fields["step"]))]
        if self.journal is not None:
            try:
                self.journal.write(kind, **fields)
            except OSError as error:
                run = str(self.run_dir)
                raise Halted(JOURNAL_LOST, path=str(self.journal.path), error=str(error), run=run) from error
        kept = {k: fields[k] for k in _OF_A_STEP if k in fields} if kind == "step" else fields
        if kind != "start":
            self._records.append({"kind": kind, **kept})

    def go_on(self, line: Iterable[Mapping[str, Any]] = ()) -> None:
        """The run goes on from a saved state, to which ``line`` led: what was recorded after it is of another line."""
        self._records.clear()
        self._records.extend(line)
        record = self.port.state_record()
        told = {"step": record["step"], "attempt": record["attempt"], "treated": treated(record)}
        self.record("resume", **told)

    def _rows(self, step: int) -> tuple[Any, ...]:
        try:
            return self.port.rows(step)
        except NotPossible:
            return ()

    def capsule(self, incident: Incident, case: Case, before: Snapshot) -> str | None:
        """Name the rows, and write the capsule where there is a folder; its place there."""
        if not incident.rows:
            incident.rows = self._rows(incident.step)
        if self.run_dir is None:
            return None
        folder = incident_folder(self.run_dir, incident.number)
        try:
            captured = with_script(capture(self.port, case, before.mark), self.port)
            write_capsule(folder, captured, self.port, incident, self.options)
        except (OSError, NotPossible) as error:
            self._refused(incident, str(error))
            return None
        return (folder / FOLDER).relative_to(self.run_dir).as_posix()

    def tell(self, incident: Incident) -> None:
        """Write ``incident.json`` as the incident stands now."""
        if self.run_dir is None:
            return
        try:
            write_incident(incident_folder(self.run_dir, incident.number), incident)
        except OSError as error:
            self._refused(incident, str(error))

    def _refused(self, incident: Incident, reason: str) -> None:
        found = CAPSULE_NOT_WRITTEN.find("", number=incident.number, step=incident.step, reason=reason)
        self.port.findings.append(found)

    def close(self) -> None:
        """Close the journal; what the disk does not take even now is lost."""
        if self.journal is None:
            return
        try:
            self.journal.close()
        except OSError:
            self.journal.abandon()
