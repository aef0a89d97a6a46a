"""Kills while a checkpoint is written, and what is left: what both trainers make of it.

Used by resume_peers.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import time
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from resume_runs import Bench, Story, story, wait
from resume_sides import FINAL, Job

SETTLE_S = 0.5
"""Wait before a kill that is to hit between saves: steps of a tiny model are shorter than a save in the background."""
LATER_FILES = {"trusted.json"}
"""Files that come into a checkpoint after it stands."""
WEIGHTS = ("model.safetensors", "adapter_model.safetensors")


# --- Looking at what is left -----------------------------------------------------------------------------------


def checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    found = [p for p in run_dir.glob("checkpoint-*") if p.is_dir() and p.name[11:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[11:]))


def files_of(folder: Path) -> set[str]:
    """Names of the files that a checkpoint consists of."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - LATER_FILES


def torn(folder: Path, expected: set[str]) -> str | None:
    """What is missing or unreadable in a checkpoint; None where nothing is."""
    missing = sorted(expected - files_of(folder))
    if missing:
        return f"{len(missing)} of {len(expected)} files missing"
    for path in sorted(folder.rglob("*")):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                with safe_open(str(path), "pt") as tensors:
                    list(tensors.keys())
            elif path.suffix in {".pt", ".pth", ".bin"} and zipfile.ZipFile(path).testzip() is not None:
                return f"{path.name} damaged"
        except Exception as error:  # noqa: BLE001  any failure to read is the finding
            return f"{path.name}: {type(error).__name__}"
    return None


def leftovers(run_dir: Path) -> int:
    """Half-written folders under other names."""
    return sum(p.is_dir() and p.name.startswith(".") for p in run_dir.iterdir())


def weights(folder: Path) -> dict[str, torch.Tensor] | None:
    """The final weights a run wrote; None where it wrote none."""
    for name in WEIGHTS:
        if (folder / FINAL / name).is_file():
            return load_file(str(folder / FINAL / name))
    return None


def same_weights(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same bits."""
    a, b = weights(one), weights(other)
    if a is None or b is None or a.keys() != b.keys():
        return False
    return all(torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a)


@dataclass(frozen=True, slots=True)
class Reference:
    """The run that nobody disturbed."""

    job: Job
    run_dir: Path
    told: Story

    @property
    def losses(self) -> dict[int, str]:
        """Loss by step, as hexadecimal float."""
        return {s["step"]: s["loss"] for s in self.told.steps}


def reference(bench: Bench, job: Job, run_dir: Path) -> Reference:
    """Run it. The measurements rest on it, so that a failure is one of this script."""
    told = bench.run(job, run_dir)
    if not told.finished:
        raise RuntimeError(f"{bench.side}: the undisturbed run failed: {told.error}")
    return Reference(job, run_dir, told)


def is_exact(resumed: Story, truth: Reference, run_dir: Path) -> bool:
    """Every loss after the resume and the final weights are those of the undisturbed run, bit for bit."""
    return (
        resumed.finished
        and all(s["loss"] == truth.losses.get(s["step"]) for s in resumed.steps)
        and same_weights(run_dir, truth.run_dir)
    )


def done_again(killed: Story, resumed: Story) -> int:
    """Steps that the kill cost. A resume without any step found the run complete, or failed."""
    if resumed.began is None:
        return 0 if resumed.finished else killed.last
    return killed.last - resumed.began


def plain(text: str, *folders: Path) -> str:
    """An error as a table shows it: one line, no folder names, not too long."""
    for folder in folders:
        text = text.replace(str(folder), "RUN")
    text = re.sub(r"\s+", " ", re.sub(r"0x[0-9a-f]+", "0x..", text)).replace("|", "/")
    return text if len(text) <= 160 else text[:157] + "..."


# --- Kills -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Kills:
    """What a series of kills came to."""

    total: int = 0
    early: int = 0
    torn: int = 0
    leftovers: int = 0
    none_whole: int = 0
    exact: int = 0
    differs: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    by_hand: int = 0
    by_hand_exact: int = 0
    lost: list[int] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """What the table shows, by name."""
        return {
            "kills": self.total,
            "of them before the checkpoint was whole": self.early,
            "kills that left a torn `checkpoint-N`": self.torn,
            "kills that left a half-written folder under another name": self.leftovers,
            "kills that left no whole checkpoint": self.none_whole,
            "resume as asked for: exact": self.exact,
            "resume as asked for: fails": sum(self.refused.values()),
            "resume as asked for: goes on and differs": self.differs,
            "then by hand from the newest whole one: exact": f"{self.by_hand_exact} of {self.by_hand}",
            "steps done again, mean": sum(self.lost) / len(self.lost),
            "steps done again, most": max(self.lost),
            "errors": "; ".join(f"{count} x {text}" for text, count in self.refused.most_common()) or "-",
        }


def save_window_s(bench: Bench, job: Job, run_dir: Path, step: int) -> float:
    """Seconds from the end of ``step`` until its checkpoint is whole on the disk, by the file system's clock."""
    told = bench.run(job, run_dir, kill_at=step + job.save_steps - 1, kill_wait_s=SETTLE_S)
    folder = run_dir / f"checkpoint-{step}"
    stands_s = max(folder.stat().st_ctime, *(p.stat().st_mtime for p in folder.iterdir()))
    return stands_s - float(next(s["clock_s"] for s in told.steps if s["step"] == step))


def kill_after(bench: Bench, job: Job, run_dir: Path, step: int, delay_s: float) -> Story:
    """SIGKILL ``delay_s`` after the end of ``step``, when its save begins."""
    read, write = os.pipe()
    record = bench.new()
    pid = bench.start(record, job, run_dir, mark_at=step, mark_fd=write)
    os.close(write)
    if os.read(read, 1):
        until_s = time.perf_counter() + delay_s
        while time.perf_counter() < until_s:
            time.sleep(max(0.0, min(0.0002, until_s - time.perf_counter())))
        os.kill(pid, signal.SIGKILL)
    os.close(read)
    return story(record, wait(pid))


def kills_while_saving(bench: Bench, job: Job, folder: Path, count: int, step: int) -> dict[str, Any]:
    """``count`` kills spread evenly over the save of ``step`` and a quarter beyond it."""
    truth = reference(bench, job, folder / "truth")
    expected = files_of(checkpoints(truth.run_dir)[-1])
    window_s = statistics.median(save_window_s(bench, job, folder / f"calm-{n}", step) for n in range(3))
    kills = Kills()
    for index in range(count):
        run_dir = folder / f"kill-{index}"
        killed = kill_after(bench, job, run_dir, step, 1.25 * window_s * (index + 0.5) / count)
        kills.total += 1
        kills.early += torn(run_dir / f"checkpoint-{step}", expected) is not None
        _after_kill(bench, truth, run_dir, killed, expected, kills)
        shutil.rmtree(run_dir, ignore_errors=True)
    return {"until a checkpoint stands, ms": 1000 * window_s} | kills.row()


def _after_kill(bench: Bench, truth: Reference, run_dir: Path, killed: Story, expected: set[str], kills: Kills) -> None:
    """Look at the folder, resume as a user would, and by hand where that fails."""
    here = checkpoints(run_dir)
    whole = [p for p in here if torn(p, expected) is None]
    kills.torn += len(whole) < len(here)
    kills.leftovers += leftovers(run_dir) > 0
    kills.none_whole += not whole
    resumed = bench.run(truth.job, run_dir, resume=True)
    if resumed.error is None:
        good = is_exact(resumed, truth, run_dir)
        kills.exact += good
        kills.differs += not good
    else:
        kills.refused[plain(resumed.error, run_dir)] += 1
        if whole:
            resumed = bench.run(truth.job, run_dir, resume=str(whole[-1]))
            kills.by_hand += 1
            kills.by_hand_exact += is_exact(resumed, truth, run_dir)
    kills.lost.append(done_again(killed, resumed))
