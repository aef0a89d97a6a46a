"""One case of FaultBench under ``arc-training``, as a program of its own.

    python benchmarks/external/arc_training.py faults/NAME/SEED/arc_training FOLDER

arc-training is AGPL: FiniTune never imports it. The bench starts this program where arc-training is installed, and
reads what it leaves in FOLDER: witness.json and weights.safetensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import arc
import torch
from safetensors.torch import save_file

from finitune.bench.cases import Case
from finitune.bench.harness import planted
from finitune.bench.loops import Script
from finitune.bench.witness import Witness
from finitune.bench.workload import sequence
from finitune.core.journal import encode


class ControlledScript(Script):
    """The loop of its README: ``controller.step(loss)`` between backward and the update."""

    def __init__(self, load: Any, witness: Witness) -> None:
        super().__init__(load, witness)
        with contextlib.redirect_stdout(io.StringIO()):
            self.controller = arc.Controller(load.model, load.optimizer, scaler=self.scaler)

    def one(self, batch: object) -> tuple[bool, float]:
        """One optimizer step."""
        parts, total = list(sequence(batch)), None
        for micro in parts:
            loss = self.load.compute(self.load.model, micro) / len(parts)
            (self.scaler.scale(loss) if self.scaler is not None else loss).backward()
            total = loss.detach() if total is None else total + loss.detach()
        with contextlib.redirect_stdout(io.StringIO()):
            action = self.controller.step(total)
        if action.failure_type:
            self.witness.find("", text=str(action.failure_type))
        committed = not action.should_skip
        if committed:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.load.max_grad_norm or math.inf)
            (self.scaler.step(self.load.optimizer) if self.scaler is not None else self.load.optimizer.step())
            if self.scaler is not None:
                self.scaler.update()
        self.scheduler.step()
        self.load.optimizer.zero_grad(set_to_none=True)
        return committed, float(total)


def main() -> None:
    """Train, and leave what was seen."""
    kind, name, seed, contender = sys.argv[1].split("/")
    folder = Path(sys.argv[2])
    torch.set_num_threads(1)
    workload, _ = planted(Case(kind, name, int(seed), contender))
    witness = Witness(workload)
    torch.manual_seed(int(seed))
    ControlledScript(workload, witness).run()
    kept = {
        f.name: getattr(witness, f.name) for f in dataclasses.fields(witness) if f.name not in ("load", "_started_s")
    }
    kept["said"] = [dataclasses.asdict(s) for s in witness.said]
    state = {n: p.detach().clone().contiguous() for n, p in workload.model.named_parameters()}
    save_file(state, folder / "weights.safetensors")
    (folder / "witness.json").write_text(json.dumps(encode(kept)), encoding="utf-8")


if __name__ == "__main__":
    main()
