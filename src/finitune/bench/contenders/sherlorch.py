"""``sherlorch.trace``: a provenance tracker that names the operation that first gave NaN or inf.

Meant for: finding the operation behind a NaN, while debugging. It changes nothing; the loop is the plain one.
"""

from __future__ import annotations

from typing import Any

from finitune.bench.contenders._installed import missing_package
from finitune.bench.loops import Script
from finitune.bench.witness import Witness
from finitune.bench.workload import Workload, sequence

MEANT_FOR = "finding the operation behind a NaN, while debugging"


class TracedScript(Script):
    """The plain loop; every forward pass is traced, and diagnosed where its loss is not finite."""

    def backward(self, micros: object) -> float:
        """Gradients of all micro-batches; their mean loss."""
        import sherlorch

        parts, total = list(sequence(micros)), 0.0
        for micro in parts:
            with sherlorch.trace() as tracker:
                tracker.watch(self.load.model, name="")
                loss = self.load.compute(self.load.model, micro) / len(parts)
                if tracker.has_issue(loss):
                    self._diagnose(tracker, loss)
            (self.scaler.scale(loss) if self.scaler is not None else loss).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def _diagnose(self, tracker: Any, loss: Any) -> None:
        try:
            culprits = tracker.diagnose(loss).culprits
        except KeyError as error:
            self.witness.find("", text=str(error))
            return
        names = [(c.module_path or "").lstrip(".") for c in culprits]
        where = [("op", c.op_name) for c in culprits] + [("module", n) for n in names if n]
        where += [("parameter", f"{n}.weight") for n in names if n]
        self.witness.find("", tuple(where), "an operation gave a value that is not finite")


def missing() -> str | None:
    """Whether sherlorch is installed."""
    return missing_package("sherlorch")


def drive(load: Workload, witness: Witness) -> None:
    """Train under the tracker."""
    TracedScript(load, witness).run()
