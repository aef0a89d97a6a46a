"""What a run keeps of its incidents: ``incidents/NNN/`` with the incident and its capsule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from finitune.core.incident import Incident
from finitune.core.types import Finding
from finitune.engine.capsule import (
    FOLDER,
    INCIDENTS,
    CapsuleOptions,
    incident_folder,
    write_capsule,
    write_incident,
)
from finitune.engine.capture import capture
from finitune.engine.case import Case
from finitune.engine.codes_incident import CAPSULE_NOT_WRITTEN
from finitune.engine.conditions import NotPossible
from finitune.engine.port import ReplayPort
from finitune.engine.snapshot import Snapshot
from finitune.models import precision as precisions
from finitune.numerics.seeds import generators_kept
from finitune.train import checkpoint
from finitune.train import prepare as preparing
from finitune.train.compute import Compute
from finitune.train.recipe import Recipe
from finitune.train.recipe_io import resolved_precision

MAX_CAPSULES_BYTES = 1 << 30
"""Weights are stored with the incidents of a run up to this size; the later ones hold fingerprints only."""


class CapsuleKeeper:
    """Writes the incidents of one run. A disk that refuses is said, and costs the capsule, never the run."""

    def __init__(
        self,
        run_dir: Path,
        port: ReplayPort,
        recipe: str | None,
        found: Callable[[Finding], None],
        options: CapsuleOptions | None = None,
    ) -> None:
        """``recipe``: YAML of the resolved recipe; ``found``: told what could not be written."""
        self.run_dir, self.port, self.recipe, self.found = run_dir, port, recipe, found
        self.options = options or CapsuleOptions()

    def keep(self, incident: Incident, case: Case, before: Snapshot) -> str | None:
        """Write the capsule; its place in the run's folder. The port stands at ``before``."""
        folder = incident_folder(self.run_dir, incident.number)
        try:
            captured = capture(self.port, case, before.mark)
            options = self._affordable()
            write_capsule(
                folder, captured, self.port, incident, options, recipe=self.recipe, checkpoint=self._checkpoint()
            )
        except (OSError, NotPossible) as error:
            self._refused(incident, str(error))
            return None
        return (folder / FOLDER).relative_to(self.run_dir).as_posix()

    def tell(self, incident: Incident) -> None:
        """Write ``incident.json`` as the incident stands now."""
        try:
            write_incident(incident_folder(self.run_dir, incident.number), incident)
        except OSError as error:
            self._refused(incident, str(error))

    def _refused(self, incident: Incident, reason: str) -> None:
        self.found(CAPSULE_NOT_WRITTEN.find("", number=incident.number, step=incident.step, reason=reason))

    def _affordable(self) -> CapsuleOptions:
        """Without weights where the run's capsules are large already."""
        if self.options.weights != "auto":
            return self.options
        taken = sum(p.stat().st_size for p in (self.run_dir / INCIDENTS).glob(f"*/{FOLDER}/*.safetensors"))
        return replace(self.options, weights="digest") if taken >= MAX_CAPSULES_BYTES else self.options

    def _checkpoint(self) -> str | None:
        """The newest checkpoint: where the weights can be had from, with the journal."""
        return next((p.name for p in checkpoint.listed(self.run_dir)), None)


def base_tensors(recipe: Recipe) -> dict[str, torch.Tensor]:
    """Weights and buffers of the model that training begins from, on the CPU: a "delta" capsule is taken against them.

    Raises UserError or UserErrors where the model cannot be had.
    """
    cpu = torch.device("cpu")
    precision = precisions.choose(resolved_precision(recipe), cpu).precision
    with generators_kept():
        loaded = preparing.load_model(recipe, precision, cpu, None)
        model = preparing.make_trainable(recipe, loaded, Compute(precision, cpu), None)
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
