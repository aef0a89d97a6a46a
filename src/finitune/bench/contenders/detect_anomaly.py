"""``torch.autograd.detect_anomaly``: the backward pass stops with an error at the first NaN that an operation makes.

Meant for: finding the operation whose backward gives NaN, while debugging.
"""

from __future__ import annotations

import re

import torch

from finitune.bench.loops import Script
from finitune.bench.witness import Witness
from finitune.bench.workload import Workload

MEANT_FOR = "finding the operation whose backward gives NaN, while debugging"
_FUNCTION = re.compile(r"Function '(\w+)'")


class AnomalyScript(Script):
    """The plain loop in anomaly mode."""

    def one(self, batch: object) -> tuple[bool, float]:
        """One optimizer step."""
        try:
            with torch.autograd.detect_anomaly():
                return super().one(batch)
        except RuntimeError as error:
            found = _FUNCTION.search(str(error))
            self.witness.find("", (("op", found.group(1)),) if found else (), str(error).splitlines()[0])
            raise


def missing() -> str | None:
    """Always there."""
    return None


def drive(load: Workload, witness: Witness) -> None:
    """Train until an anomaly."""
    AnomalyScript(load, witness).run()
