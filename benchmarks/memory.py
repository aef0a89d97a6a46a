"""Peak memory against the HF Trainer: each side in a process of its own, same model and batches.

python benchmarks/memory.py
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from common import hf_trainer, quiet, report
from finitune.train.prepare import prepare
from speed import loop_of, peer_model, recipe_for

STEPS = 4


def one_side(side: str, kind: str) -> None:
    """Train a few steps and print the peak resident set and that before training, in MiB."""
    quiet()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        prepared = prepare(recipe_for(kind, scratch, "per_device_train_batch_size=8", "data.max_length=512"))
        loader, cursor, batches = prepared.port.parts.loader, prepared.port.state.cursor, []
        for _ in range(STEPS):
            batches += loader.at(cursor)
            cursor = loader.advance(cursor)
        if side == "hf":
            model = peer_model(kind, scratch, prepared)
            trainer = hf_trainer(
                model, batches, scratch / "hf", max_steps=STEPS, save_strategy="no", learning_rate=1e-4
            )
            del prepared
        else:
            loop = loop_of(prepared, scratch, "memory")
        before = resident_bytes()
        if side == "hf":
            trainer.train()
        else:
            for _ in range(STEPS):
                loop.one()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"before": before >> 20, "peak": peak >> 20}))


def resident_bytes() -> int:
    """Resident set now."""
    import psutil

    return psutil.Process().memory_info().rss


def main() -> None:
    """The table."""
    if len(sys.argv) > 1:
        one_side(*sys.argv[1:3])
        return
    rows = []
    for kind in ("lora", "full"):
        found = {}
        for side in ("hf", "ours"):
            out = subprocess.run([sys.executable, __file__, side, kind], capture_output=True, text=True, check=True)
            found[side] = json.loads(out.stdout.strip().splitlines()[-1])
        added = {side: f["peak"] - f["before"] for side, f in found.items()}
        rows.append(
            {
                "case": kind,
                "HF peak MiB": found["hf"]["peak"],
                "ours peak MiB": found["ours"]["peak"],
                "HF added by training MiB": added["hf"],
                "ours added MiB": added["ours"],
                "ratio of added": added["ours"] / added["hf"],
            }
        )
    report("memory", rows, ["Batch 8, rows up to 512 tokens, fp32; peak resident set of the process."])


if __name__ == "__main__":
    main()
