"""``arc-training``'s Controller with its defaults: rolls back and lowers the rate where loss or gradients look wrong.

Meant for: going on after a failure. It is AGPL and never imported here: a program of its own drives it, which the
working copy has in ``benchmarks/external``; elsewhere FINITUNE_BENCH_ARC names it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from finitune.bench.contenders._installed import missing_package
from finitune.bench.witness import Said, Witness
from finitune.bench.workload import Workload
from finitune.core.journal import number

MEANT_FOR = "going on after a failure, by rollback and a lower rate"
_MAX_S = 240


def missing() -> str | None:
    """Whether the distribution and the program are there."""
    if (reason := missing_package("arc-training")) is not None:
        return reason
    return None if _program().is_file() else "the program that drives arc-training is not there"


def _program() -> Path:
    usual = Path(__file__).resolve().parents[4] / "benchmarks" / "external" / "arc_training.py"
    return Path(os.environ.get("FINITUNE_BENCH_ARC", usual))


def drive(load: Workload, witness: Witness) -> None:
    """Let the program train; take over its weights and what it saw."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        asked = [sys.executable, str(_program()), load.key, folder]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=_MAX_S, cwd=folder)  # noqa: S603
        if done.returncode != 0:
            raise RuntimeError(f"the program ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        told = json.loads((Path(folder) / "witness.json").read_text(encoding="utf-8"))
        weights = load_file(Path(folder) / "weights.safetensors")
    for name, parameter in load.model.named_parameters():
        parameter.data.copy_(weights[name])
    said = [Said(s["step"], s["code"], tuple((k, n) for k, n in s["where"]), s["text"]) for s in told.pop("said")]
    told["losses"] = {int(step): number(loss) for step, loss in told["losses"].items()}
    for name, value in told.items():
        setattr(witness, name, value)
    witness.said = said
