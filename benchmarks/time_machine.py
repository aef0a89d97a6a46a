"""What the time machine costs: snapshots, digests, checkpoints, journal, resume; on the real 135M model.

    python benchmarks/time_machine.py [lora] [full]

A run of 24 steps that saves every 8, journals its digest every 8 and takes snapshots by its own rule; every cost is
measured where it is paid, in the training thread, and set against the time the steps themselves took. Resume is
measured in a process of its own against opening a new run of the same recipe (model, data and plan alone).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import quiet, report
from finitune.core.journal import Journal, read
from finitune.engine.snapshot import Buffers, state_bytes
from finitune.numerics.fingerprint import fingerprint
from finitune.train.recipe_io import load_recipe
from finitune.train.run import open_run

STEPS = 24
KINDS = ("lora", "full")


def recipe_for(kind: str, run: Path, *overrides: str) -> Any:
    """The quickstart's model and data, saving and marking three times in a run."""
    full = ["lora=null", "learning_rate=1e-5"] if kind == "full" else []
    base = [
        f"max_steps={STEPS}",
        "save_steps=8",
        "snapshots.digest_steps=8",
        "eval_steps=null",
        "data.eval_fraction=0",
        "data.limit_rows=400",
        "sample.prompts=[]",
        "sample.every_steps=null",
        "per_device_train_batch_size=4",
        f"output_dir={run}",
    ]
    return load_recipe("quickstart", [*base, *full, *overrides])


class Watch:
    """Times of the steps, apart for those during which a checkpoint was being written."""

    def __init__(self) -> None:
        self.alone: list[float] = []
        self.beside: list[float] = []
        self.session: Any = None

    def on_step(self, event: Any) -> None:
        """Sort the step's time."""
        writing = self.session is not None and self.session.keeper.busy
        (self.beside if writing else self.alone).append(event.time_s)


def one_run(kind: str, run: Path, *overrides: str) -> dict[str, Any]:
    """Train; what the training thread paid for what."""
    watch = Watch()
    session = open_run(recipe_for(kind, run, *overrides), observers=[watch])
    watch.session = session
    result = session.run()
    assert result.status == "finished", result
    ring, train_s = session.machine.ring, result.train_time_s
    return {
        "step s (median)": statistics.median(watch.alone),
        "step s while a checkpoint is written": statistics.median(watch.beside) if watch.beside else None,
        "snapshots taken every n steps": ring.distance.steps,
        "snapshots % of step time": 100 * ring.cost_s / train_s,
        "journalled digest ms each": 1000 * session.machine.digest_s / (STEPS // 8 + 1),
        "checkpoint stall s each": session.keeper.stall_s / 3,
        "stall % of step time, saving every 100": session.keeper.stall_s / 3 / statistics.median(watch.alone),
        "snapshot slots": ring.num_slots,
        "snapshot MiB": state_bytes(session.prepared.port) / 2**20,
        "ring, copy for saves MiB": session.prepared.snapshots.used_bytes / 2**20,
        **copies(session),
        **journal_cost(run),
    }


def copies(session: Any) -> dict[str, float]:
    """Medians of single operations on the final state, buffers warm."""
    port, buffers = session.prepared.port, Buffers()

    def median_ms(work: Any) -> float:
        work()
        times = []
        for _ in range(5):
            started_s = time.perf_counter()
            work()
            times.append(1000 * (time.perf_counter() - started_s))
        return statistics.median(times)

    return {
        "copy ms": median_ms(lambda: buffers.copy(port)),
        "fingerprint ms": median_ms(lambda: fingerprint(port.state_tensors(), port.state_record())),
    }


def journal_cost(run: Path) -> dict[str, float]:
    """Bytes of the journal a step, and microseconds to write a step record."""
    path = run / "journal.jsonl"
    steps = [r for r in read(path) if r["kind"] == "step"]
    with tempfile.TemporaryDirectory() as temporary:
        again = Journal(Path(temporary) / "journal.jsonl")
        records = [{k: v for k, v in r.items() if k not in ("schema", "kind", "time", "crc")} for r in steps] * 40
        started_s = time.perf_counter()
        for record in records:
            again.write("step", **record)
        each_s = (time.perf_counter() - started_s) / len(records)
        size = (Path(temporary) / "journal.jsonl").stat().st_size / len(records)
        again.close()
    return {
        "journal bytes a step": size,
        "journal microseconds a step": 1e6 * each_s,
        "journal bytes a step, all records": path.stat().st_size / len(steps),
    }


def opening(kind: str, run: str, resume: bool) -> None:
    """Print the seconds until a run is ready for its first step: resumed, or new."""
    quiet()
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        longer = f"max_steps={2 * STEPS}"  # a finished run has nothing left to open
        new = Path(temporary) / "new"
        recipe = load_recipe(f"{run}/recipe.yaml", [longer]) if resume else recipe_for(kind, new, longer)
        session = open_run(recipe, resume=run if resume else None)
        session.prepared.port.forward_backward()
        print(json.dumps(time.perf_counter() - started_s))


def opened(kind: str, run: Path) -> dict[str, float]:
    """Medians of three, taking turns."""
    times: dict[str, list[float]] = {"new": [], "resume": []}
    for _ in range(3):
        for how, found in times.items():
            out = subprocess.run(
                [sys.executable, __file__, "opening", kind, str(run), how], capture_output=True, text=True, check=True
            )
            found.append(json.loads(out.stdout.strip().splitlines()[-1]))
    new_s, resume_s = (statistics.median(t) for t in times.values())
    return {"new run to first step s": new_s, "resume to first step s": resume_s, "resume / new": resume_s / new_s}


def main() -> None:
    """The table."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["opening"]:
        opening(arguments[1], arguments[2], arguments[3] == "resume")
        return
    quiet()
    rows = []
    for kind in [a for a in arguments if a in KINDS] or KINDS:
        with tempfile.TemporaryDirectory() as temporary:
            run = Path(temporary) / "run"
            row: dict[str, Any] = {"case": kind, **one_run(kind, run)}
            row |= opened(kind, run)
            inline = one_run(kind, Path(temporary) / "inline", "save_in_background=false")
            row["stall s without background"] = inline["checkpoint stall s each"]
        rows.append(row)
    turned = [{"what": name, **{str(row["case"]): row[name] for row in rows}} for name in rows[0] if name != "case"]
    report("time_machine", turned, ["SmolLM2-135M, batch 4, rows up to 256 tokens, fp32; 24 steps, 3 saves."])


if __name__ == "__main__":
    main()
