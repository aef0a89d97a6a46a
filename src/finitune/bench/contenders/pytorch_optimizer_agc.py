"""``pytorch_optimizer``'s adaptive gradient clipping (agc), before the usual clipping by norm.

Meant for: large gradients that are finite.
Source: Brock et al. 2021, "High-Performance Large-Scale Image Recognition Without Normalization".
"""

from __future__ import annotations

from finitune.bench.contenders._installed import missing_package
from finitune.bench.loops import Script
from finitune.bench.witness import Witness
from finitune.bench.workload import Workload

MEANT_FOR = "large gradients that are finite"


class ClippedScript(Script):
    """The plain loop with agc between clipping and the update."""

    def update(self, norm: float) -> bool:
        """Clip unit by unit, then step."""
        from pytorch_optimizer.optimizer.agc import agc

        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad = agc(parameter.detach(), parameter.grad)
        return super().update(norm)


def missing() -> str | None:
    """Whether pytorch_optimizer is installed."""
    return missing_package("pytorch_optimizer")


def drive(load: Workload, witness: Witness) -> None:
    """Train with agc."""
    ClippedScript(load, witness).run()
