"""Kill and resume: what is exact and what is lost, in the HF Trainer and in FiniTune.

    python benchmarks/resume_peers.py [exact] [between] [kills] [damage] [disk] [seek] [formats] [--kills N]

Both train the same tiny Llama on the same rows with the same settings; each keeps its own loader and defaults, and is
compared, bit for bit, with its own run that nobody disturbed. Every run is a process of its own on one thread. Names
on the command line run only these parts and keep the other parts of the record that is there.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, _cell, machine, quiet
from finitune.core.journal import encode
from resume_damage import damaged, formats, full_disk
from resume_exact import between, exact
from resume_faults import SETTLE_S, kills_while_saving
from resume_runs import Bench, Story, apart, import_everything, make_base, wait
from resume_sides import SIDES, Job

NAME = "resume_peers"


@dataclass(frozen=True, slots=True)
class Part:
    """One table."""

    title: str
    measure: Callable[[Path, Path, Sequence[str]], list[dict[str, Any]]]
    """From (base folder, scratch folder, sides) to rows."""
    notes: tuple[str, ...] = ()
    timed: bool = False
    """Times are measured: the sides take turns instead of running at once."""


# --- Kills, damage, disk, formats ------------------------------------------------------------------------------


def kills(base: Path, scratch: Path, sides: Sequence[str]) -> list[dict[str, Any]]:
    """Kills spread over a save, one column a series."""
    job = Job(base, model="wide", save_steps=4, max_steps=12)
    columns = {}
    for side in sides:
        for limit, count in ((1, _num_kills()), (None, max(1, _num_kills() // 2))):
            bench = Bench(side, scratch / side / str(limit))
            series = kills_while_saving(bench, replace(job, keep=limit), bench.folder / "runs", count, 8)
            columns[f"{side}, save_total_limit {limit or 'not set'}"] = series
    names = next(iter(columns.values()))
    return [{"": name} | {title: series[name] for title, series in columns.items()} for name in names]


def _num_kills() -> int:
    return int(sys.argv[sys.argv.index("--kills") + 1]) if "--kills" in sys.argv else 21


def damage(base: Path, scratch: Path, sides: Sequence[str]) -> list[dict[str, Any]]:
    """The answers to the same damage, one column a side."""
    job = Job(base, model="dropout")
    return [row for side in sides for row in damaged(Bench(side, scratch / side), job, scratch / side / "runs", 22)]


def disk(base: Path, scratch: Path, sides: Sequence[str]) -> list[dict[str, Any]]:
    """A disk that is full for a while, and one that stays full."""
    job = Job(base, model="wide", save_steps=4, max_steps=16)
    return [
        full_disk(Bench(side, scratch / side / str(room)), job, scratch / side / f"runs-{room}", 7, room)
        for side in sides
        for room in (10, None)
    ]


def formats_of(base: Path, scratch: Path, sides: Sequence[str]) -> list[dict[str, Any]]:
    """What a checkpoint consists of."""
    job = Job(base)
    return [row for side in sides for row in formats(Bench(side, scratch / side), job, scratch / side / "runs", 22)]


# --- Finding the place again -----------------------------------------------------------------------------------


def seek(base: Path, scratch: Path, sides: Sequence[str]) -> list[dict[str, Any]]:
    """Time to the first step: a new run, and resumed runs of different age."""
    job = Job(base, model="small", rows=2400, max_steps=1100, save_steps=100)
    kinds = [(side, side, job) for side in sides]
    kinds.insert(1, ("HF Trainer", "HF Trainer, IterableDataset", replace(job, streaming=True)))
    rows = []
    for side, name, used in kinds:
        for age in (0, 100, 1000):
            bench = Bench(side, scratch / name / str(age))
            run_dir = bench.folder / "run"
            if age:
                bench.run(used, run_dir, kill_at=age + 10, kill_wait_s=SETTLE_S)
            tries = [_first_step(bench, used, run_dir, age, number) for number in range(3)]
            rows.append(
                {
                    "trainer": name,
                    "resumed at step": age or "new run",
                    "first step is": tries[0].last,
                    "rows fetched before it was done": tries[0].steps[0]["rows_read"] if side != "FiniTune" else "-",
                    "s to the end of the first step (least of 3)": min(t.steps[0]["at_s"] for t in tries),
                    "CPU s of it": min(t.steps[0]["cpu_s"] for t in tries),
                }
            )
    return rows


def _first_step(bench: Bench, job: Job, run_dir: Path, age: int, number: int) -> Story:
    """Go as far as the first step and no further."""
    place = run_dir if age else bench.folder / f"new-{number}"
    told = bench.run(job, place, resume=True if age else None, kill_at=age + 1)
    if told.error is not None or not told.steps:
        raise RuntimeError(f"{bench.side}: no first step at {age}: {told.error or told.ended}")
    return told


# --- Report ----------------------------------------------------------------------------------------------------

MEANT = (
    "**What each is meant to do.** The HF Trainer writes `checkpoint-N` file by file in its final place: weights, "
    "optimizer, scheduler, RNG states, and `trainer_state.json` last. `resume_from_checkpoint=True` takes the folder "
    "with the highest number and restores the states found in it; `ignore_data_skip=False` (default) promises an "
    "exact continuation of the data. There is no list of the files that belong to a checkpoint, and falling back to "
    "an older one has been asked for (huggingface/transformers#35525). FiniTune writes the folder aside, with sizes "
    "and digests in a manifest, and renames it; `--resume RUN` verifies it, takes the newest good one, says what it "
    "passed over, and promises that the run goes on bit for bit. Measured on one machine, with one set of versions."
)
PARTS = {
    "exact": Part(
        "Exactness: SIGKILL between checkpoints, then resume",
        exact,
        (
            "2 epochs of 30 rows, batch 2, shuffled, a checkpoint every 5 steps (so step 15 is the end of an epoch; "
            "8 steps an epoch with 2 micro-batches). Before the kill the process waits "
            f"{SETTLE_S} s, so that a save in the background is over. Rows are counted over the whole run as it "
            "stands at the end: the steps up to the resume, and those after it.",
            "Grouped by length: HF's LengthGroupedSampler draws its order from torch's global generator when an epoch "
            "begins. A resume inside a later epoch draws it from a freshly seeded generator, so that the order is "
            "another one and the rows already skipped are not those that were seen.",
            "fp16: on a CPU accelerate 1.15 makes no GradScaler and no autocast for `fp16=True` (the column is read "
            "from the running trainer), so that the HF line is fp32 arithmetic; FiniTune's is emulated fp16 with its "
            "scaler. A scaler's resume in the HF Trainer cannot be measured without a GPU.",
        ),
    ),
    "between": Part(
        "SIGKILL and SIGTERM at some steps, without a wait",
        between,
        (
            "Attention dropout 0.1, a checkpoint every 5 steps, 30 steps. Steps take milliseconds here: FiniTune's "
            "background save of a tiny model may still be under way when the kill comes some steps later.",
        ),
    ),
    "kills": Part(
        "SIGKILL while a checkpoint is written",
        kills,
        (
            "Full fine-tune of a 1.6M-parameter Llama, 12 steps, a checkpoint every 4; the kills are spread evenly "
            "from the end of step 8 until its checkpoint stands (median of 3 calm runs) and a quarter of that time "
            "beyond. A folder is torn when one of the files of a complete one is missing or cannot be read. After "
            "every kill one resume as a user asks for it (`resume_from_checkpoint=True`, `--resume RUN`); where this "
            "fails, a second one from the newest whole folder, named by hand. FiniTune goes on training while it "
            "writes, so that the same kill may hit it some steps later. SIGKILL leaves the page cache: this is a "
            "killed process, not a power cut. How many kills come before the checkpoint is whole is a matter of the "
            "machine: read the lines below it against it.",
        ),
        timed=True,
    ),
    "damage": Part(
        "A damaged newest checkpoint",
        damage,
        (
            "Killed after step 22 of 30, newest checkpoint at 20, one at 15 before it; attention dropout 0.1. Exact: "
            "losses and final weights are those of the undisturbed run.",
        ),
    ),
    "disk": Part(
        "A full disk",
        disk,
        (
            "No file can grow over 256 KiB (RLIMIT_FSIZE: writes fail with EFBIG) from step 7 on; checkpoints are due "
            "at steps 4, 8, 12, 16.",
        ),
    ),
    "seek": Part(
        "Finding the place in the data again",
        seek,
        (
            "2400 rows, batch 2, the resumed place lies in the first epoch. Time from before the model is built to the "
            "end of the first step. FiniTune reads and tokenises all rows at every start, new or resumed, the HF side "
            "gets them tokenised: compare down a trainer's lines, not across.",
        ),
        timed=True,
    ),
    "formats": Part("What is in a checkpoint, and what a resume unpickles", formats_of),
}
TAIL = "A NaN-ed model in a checkpoint: see `one_nan.py` and `results/one_nan.json`."


def versions() -> dict[str, str]:
    """What else the figures depend on."""
    return {name: version(name) for name in ("finitune", "accelerate", "safetensors", "numpy")}


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows as Markdown."""
    keys = list(dict.fromkeys(k for row in rows for k in row))
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    return lines + ["| " + " | ".join(shown(row.get(k, "")) for k in keys) + " |" for row in rows]


def shown(value: Any) -> str:
    """A cell."""
    return ("yes" if value else "no") if isinstance(value, bool) else _cell(value)


def page(record: dict[str, Any]) -> str:
    """The record as a Markdown page."""
    facts = ", ".join(f"{k} {v}" for k, v in record["machine"].items())
    lines = ["# Kill and resume: HF Trainer and FiniTune", "", f"`{record['command']}`, {record['date']}, {facts}."]
    lines += ["", MEANT]
    for name, part in record["parts"].items():
        lines += ["", f"## {part['title']}", "", *table(part["rows"])]
        lines += [line for note in PARTS[name].notes for line in ("", note)]
    return "\n".join([*lines, "", TAIL, ""])


def keep(parts: dict[str, Any]) -> None:
    """Record and page under ``results/``; parts that were not run stay as they are there."""
    path = RESULTS / f"{NAME}.json"
    old = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.is_file() else {}
    merged = {name: parts.get(name, old.get(name)) for name in PARTS if name in parts or name in old}
    record = {
        "name": NAME,
        "date": time.strftime("%Y-%m-%d"),
        "command": "python benchmarks/resume_peers.py",
        "machine": machine() | versions(),
        "parts": encode(merged),
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(page(record), encoding="utf-8")


def measured(part: Part, base: Path, scratch: Path) -> list[dict[str, Any]]:
    """Rows of a part; where no time is measured, each side in a process of its own, at once."""
    if part.timed:
        return part.measure(base, scratch, list(SIDES))
    scratch.mkdir()
    pids = {side: apart(scratch / f"{side}.jsonl", partial(_one_side, part, base, scratch, side)) for side in SIDES}
    rows: list[dict[str, Any]] = []
    for side, pid in pids.items():
        if (ended := wait(pid, timeout_s=600)) != "exit 0":
            raise RuntimeError(f"{part.title}, {side}: {ended}\n{(scratch / f'{side}.log').read_text()}")
        rows += json.loads((scratch / f"{side}.rows").read_text())
    return rows


def _one_side(part: Part, base: Path, scratch: Path, side: str) -> None:
    (scratch / f"{side}.rows").write_text(json.dumps(part.measure(base, scratch, [side])))


def merged(rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Rows with the same ``key`` made one."""
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        lines.setdefault(row[key], {}).update(row)
    return list(lines.values())


def main() -> None:
    """Run what was asked for, or all of it."""
    quiet()
    torch.set_num_threads(1)
    import_everything()
    names = [a for a in sys.argv[1:] if a in PARTS] or list(PARTS)
    parts = {}
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        base.mkdir()
        record = Path(temporary) / "base.jsonl"
        if (ended := wait(apart(record, lambda: make_base(base)))) != "exit 0":
            raise RuntimeError(f"the common ground failed ({ended}): {record.with_suffix('.log').read_text()}")
        for name in names:
            started_s = time.perf_counter()
            rows = measured(PARTS[name], base, Path(temporary) / name)
            rows = merged(rows, "damage") if name == "damage" else rows
            parts[name] = {"title": PARTS[name].title, "rows": rows, "took_s": time.perf_counter() - started_s}
            print("\n".join(["", f"## {name} ({parts[name]['took_s']:.0f} s)", "", *table(rows)]), flush=True)
    keep(parts)


if __name__ == "__main__":
    main()
