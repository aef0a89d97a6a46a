"""``torch.amp.GradScaler`` alone, with its defaults: it leaves out updates whose scaled gradients are not finite.

Meant for: finding a loss scale in fp16.
"""

from __future__ import annotations

import math

import torch

from finitune.bench.loops import Script
from finitune.bench.witness import Witness
from finitune.bench.workload import Workload

MEANT_FOR = "finding a loss scale in fp16"


class ScalerScript(Script):
    """The loop of the AMP tutorial, in every precision."""

    def __init__(self, load: Workload, witness: Witness) -> None:
        super().__init__(load, witness)
        self.scaler = torch.amp.GradScaler("cpu")

    def update(self, norm: float) -> bool:
        """A step that the scaler leaves out shows in its scale alone; that counts as noticed."""
        committed = super().update(norm)
        if not math.isfinite(norm):
            self.witness.find("", text="the scaler left the update out")
        return committed


def missing() -> str | None:
    """Always there."""
    return None


def drive(load: Workload, witness: Witness) -> None:
    """Train with a scaler."""
    ScalerScript(load, witness).run()
