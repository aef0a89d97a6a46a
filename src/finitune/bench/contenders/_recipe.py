"""FiniTune's own trainer with its defaults, on a run that begins with files: what it says, does and writes.

What the trainer tells its observers is what a user sees; the run folder is looked at as it is written.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finitune.bench.contenders.finitune import short
from finitune.bench.recipe_load import RecipeLoad, bad_in_files
from finitune.bench.witness import Witness
from finitune.core.errors import FiniTuneError, UserError, UserErrors
from finitune.core.incident import Incident
from finitune.core.types import Finding, Severity
from finitune.engine.policy import Action

_LISTED = ("names", "details")
"""Fields of a message that list tensors: "name[index] = value, ..." or "name: shape, ..."."""
_NAME = re.compile(r"(?:^|, )([A-Za-z_][\w.]*\.\w+)")


def drive(load: RecipeLoad, witness: Witness) -> None:
    """Train; stop and go on where the load says so."""
    watch = _Watch(load, witness)
    if _leg(load, witness, watch, resume=False) and watch.stopped:
        for act in load.on_disk:
            act(load.run_dir)
        _leg(load, witness, watch, resume=True)
    final = load.run_dir / "final"
    if final.is_dir():
        watch.on_save(str(final), load.step)


def _leg(load: RecipeLoad, witness: Witness, watch: _Watch, *, resume: bool) -> bool:
    """From opening the run to its end; whether it ended well."""
    try:
        result: Any = load.open((watch,), resume=resume).run()
    except (FiniTuneError, OSError, RuntimeError, ValueError) as error:
        for fault in _faults(error):
            witness.find(fault.code, tuple(_where(fault)), str(error).splitlines()[0])
        if not isinstance(error, (UserError, UserErrors)):
            witness.find("", text=repr(error))
        witness.raised(error)
        return False
    if result.status == "halted":
        witness.find("halted", text=str(result.halted).splitlines()[0])
        witness.raised(RuntimeError(result.halted))
        return False
    return True


def _faults(error: Exception) -> list[Finding]:
    if isinstance(error, UserErrors):
        return [e.finding() for e in error.errors]
    return [error.finding()] if isinstance(error, UserError) else []


@dataclass
class _Watch:
    """An observer that tells the witness."""

    load: RecipeLoad
    witness: Witness
    stopped: bool = False

    def on_finding(self, finding: Finding) -> None:
        """Outside of a step. Notes are told where they are about rows or weights: that a run goes on is no fault."""
        if finding.severity is not Severity.NOTE or finding.code.startswith(("DAT", "MOD")):
            self.witness.find(finding.code, tuple(_where(finding)))

    def on_step(self, event: Any) -> None:
        """After every transaction; one that is tried again is told again."""
        step = event.reading.step
        self.load.step = step - 1
        self.witness.begin()
        for finding in event.judgement.findings:
            if finding.severity is not Severity.NOTE:
                self.witness.find(finding.code, tuple(_where(finding)))
        saved = (self.witness.num_checkpoints, list(self.witness.poisoned_checkpoints))
        self.witness.stepped(committed=event.action is Action.PROCEED, loss=event.reading.loss)
        # The checkpoints of this run are real ones: they are counted when they are written.
        self.witness.num_checkpoints, self.witness.poisoned_checkpoints = saved
        self.witness.time_s += event.time_s
        if step == self.load.stop_after and not self.stopped:
            self.stopped = True
            signal.raise_signal(signal.SIGINT)  # Ctrl-C: the trainer finishes the step, saves, and returns

    def on_incident(self, incident: Incident, _run: str) -> None:
        """Closed."""
        self.witness.incidents.append(short(incident))

    def on_save(self, path: str, step: int) -> None:
        """A checkpoint stands: its files are read."""
        self.witness.num_checkpoints += 1
        if bad_in_files(Path(path)):
            self.witness.poisoned_checkpoints.append(step)


def _where(finding: Finding) -> Iterator[tuple[str, str]]:
    """What a message points at: its place, its rows, and the tensors that it lists."""
    if finding.where:
        yield "finding", finding.where
    for row in finding.rows:
        yield "row", f"{row.source}:{row.row}"
    for name in _LISTED:
        for tensor in _NAME.findall(str(finding.data.get(name, ""))):
            yield "finding", tensor
