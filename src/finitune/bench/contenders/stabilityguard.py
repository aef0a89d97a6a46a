"""``stabilityguard.GuardedOptimizer`` with its defaults: skips updates whose layer norms spike or are not finite.

Meant for: keeping gradient spikes and NaN out of the optimizer.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from typing import Any

from finitune.bench.contenders._installed import missing_package
from finitune.bench.loops import Script
from finitune.bench.witness import Witness
from finitune.bench.workload import Workload

MEANT_FOR = "keeping gradient spikes and NaN out of the optimizer"


class GuardedScript(Script):
    """The plain loop with the optimizer wrapped; in fp16 it steps without the scaler's veto, on unscaled gradients."""

    def __init__(self, load: Workload, witness: Witness, optimizer: Any) -> None:
        super().__init__(load, witness)
        self.guarded, self.layers = optimizer, list[str]()
        # Its report goes to a file and the terminal; the layer in it is what is wanted.
        optimizer._spike_logger.log_spike = lambda report: self.layers.append(report.snapshot.spike_layer or "")

    def update(self, norm: float) -> bool:  # noqa: ARG002
        """One step of the wrapper; its report names a layer."""
        before = self.guarded._total_skips
        with contextlib.redirect_stdout(io.StringIO()):
            self.guarded.step()
        if self.guarded._total_skips == before:
            return True
        layer = self.layers.pop() if self.layers else ""
        where = (("module", layer.removesuffix(".weight")), ("parameter", layer)) if layer else ()
        self.witness.find("", where, "skipped: a spike or a value that is not finite")
        return False


def missing() -> str | None:
    """Whether stabilityguard is installed."""
    return missing_package("stabilityguard")


def drive(load: Workload, witness: Witness) -> None:
    """Train with the wrapped optimizer."""
    from stabilityguard import GuardedOptimizer

    logging.getLogger("stabilityguard").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        guarded = GuardedOptimizer(load.optimizer, load.model, log_dir=folder, verbose=False)
        GuardedScript(load, witness, guarded).run()
