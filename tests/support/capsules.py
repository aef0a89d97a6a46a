"""A failing step of a tiny run, as a case and an incident, and its capsule on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finitune.core.files import write_manifest
from finitune.core.incident import Evidence, Incident, Result, Suspect, Trigger, Verdict
from finitune.core.types import Finding, Reading, Severity
from finitune.engine.capsule import CapsuleOptions, incident_folder, write_capsule, write_incident
from finitune.engine.capture import capture
from finitune.engine.case import Case
from finitune.engine.monitor import read
from finitune.engine.policy import Action
from finitune.train.facts import resolved
from finitune.train.prepare import Prepared
from finitune.train.recipe_io import to_yaml
from support.runs import ready


@dataclass
class Failing:
    """A run that stands before a step that fails."""

    home: Path
    prepared: Prepared
    case: Case
    incident: Incident

    @property
    def port(self) -> Any:
        return self.prepared.port

    @property
    def recipe(self) -> str:
        return to_yaml(resolved(self.prepared.recipe, self.prepared))

    def written(self, name: str = "run", **options: Any) -> Path:
        """The capsule's folder."""
        more = {k: options.pop(k) for k in ("recipe", "base", "checkpoint") if k in options}
        folder = incident_folder(self.home / name, self.incident.number)
        captured = capture(self.port, self.case)
        made = CapsuleOptions(**options)
        path = write_capsule(folder, captured, self.port, self.incident, made, **{"recipe": self.recipe, **more})
        write_incident(folder, self.incident)
        return path


def failing(
    home: Path, *overrides: str, steps: int = 2, spoil: Callable[[Any], None] | None = None, trigger: Any = None
) -> Failing:
    """A run after ``steps`` updates, whose next step fails: by ``spoil``, or for a loss that counts as large."""
    prepared = ready(home, *overrides)
    port = prepared.port
    with port.parts.kernels:
        for _ in range(steps):
            reading = read(port.forward_backward())
            port.commit(reading)
            port.settle(Action.PROCEED, reading, clean=True)
        if spoil is not None:
            with torch.no_grad():
                spoil(port)
        reading = read(port.forward_backward())
        port.abort()
    trigger = trigger or (Trigger.OUTLIER if spoil is None else Trigger.LOSS)
    return Failing(home, prepared, *case_of(port, reading, trigger))


def case_of(port: Any, reading: Reading, trigger: Trigger) -> tuple[Case, Incident]:
    data = {"loss": reading.loss, "step": reading.step, "limit": reading.loss / 2}
    finding = Finding("NUM001", Severity.ERROR, "", data, port.rows()[:1], True)
    case = Case(trigger, finding, reading, dict(port.facts()), {"median_loss": 1.0, "first_loss": None})
    incident = Incident(1, reading.step, port.state.attempt + 1, trigger, finding, reading.to_json(), port.rows())
    incident.verdict = Verdict.REPRODUCED
    incident.suspects = (Suspect("row", str(port.rows()[0]), {"micro": 0, "index": 0}),)
    incident.evidence = (Evidence("same_again", Result.BAD, {"loss": reading.loss}, 1.0),)
    return case, incident


def spoilt_weight(port: Any) -> None:
    """A weight that makes every loss NaN."""
    port.parameters()[3][1].view(-1)[5] = float("nan")


def rewrite(folder: Path, change: Callable[[dict], None]) -> None:
    """Change capsule.json and sign the folder anew, as a stranger would."""
    path = folder / "capsule.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))
    sign(folder)


def sign(folder: Path) -> None:
    """A manifest that agrees with what lies there."""
    (folder / "manifest.json").unlink(missing_ok=True)
    write_manifest(folder, {"capsule": 1})
