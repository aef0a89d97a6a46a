"""The four-line guard that people write: clip, and skip the update where loss or gradient norm is not finite.

Meant for: getting over single bad batches.
"""

from __future__ import annotations

import math

from finitune.bench.loops import Script
from finitune.bench.witness import Witness
from finitune.bench.workload import Workload

MEANT_FOR = "getting over single bad batches"


class SkipScript(Script):
    """Skips what is not finite."""

    def wants(self, loss: float, norm: float) -> bool:
        """Whether the update is made."""
        finite = math.isfinite(loss) and math.isfinite(norm)
        if not finite:
            self.witness.find("", text="loss or gradient norm is not finite: skipped")
        return finite


def missing() -> str | None:
    """Always there."""
    return None


def drive(load: Workload, witness: Witness) -> None:
    """Train; skip what is not finite."""
    SkipScript(load, witness).run()
