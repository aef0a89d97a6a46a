"""No guard: a PyTorch loop as in the tutorials.

Meant for: training; it looks at nothing.
"""

from __future__ import annotations

from torch import nn

from finitune.bench.contenders import _ranks
from finitune.bench.loops import Script
from finitune.bench.witness import Witness
from finitune.bench.workload import Workload

MEANT_FOR = "training; looks at nothing"
ABLE = (_ranks.NEED,)


def missing() -> str | None:
    """Always there."""
    return None


def drive(load: Workload, witness: Witness) -> None:
    """Train on every batch."""
    if _ranks.is_wanted(load):
        _ranks.drive(load, witness)
        return
    Script(load, witness).run()


def drive_rank(load: Workload, witness: Witness, model: nn.Module) -> None:
    """One rank's part of it."""
    loss = load.loss
    load.loss = lambda _inner, batch: loss(model, batch)
    Script(load, witness).run()
