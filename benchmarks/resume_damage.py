"""Damaged checkpoints, full disks and file formats: what both trainers make of them. Used by resume_peers.py."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from resume_faults import SETTLE_S, Reference, checkpoints, done_again, files_of, is_exact, plain, reference, torn
from resume_runs import Bench, Story
from resume_sides import Job, Probe

# --- Damage ----------------------------------------------------------------------------------------------------


def flip_bit(path: Path) -> None:
    """Bit 22 of an fp32 number in the middle: the value changes by up to a half and stays finite."""
    with path.open("r+b") as handle:
        start = 8 + struct.unpack("<Q", handle.read(8))[0] if path.suffix == ".safetensors" else 0
        place = start + 4 * ((path.stat().st_size - start) // 8) + 2
        handle.seek(place)
        byte = handle.read(1)[0]
        handle.seek(place)
        handle.write(bytes([byte ^ 0x40]))


def halve(path: Path) -> None:
    """Cut a file in the middle."""
    os.truncate(path, path.stat().st_size // 2)


class _Code:
    """Unpickled, it makes a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.trace),))


@dataclass(frozen=True, slots=True)
class Damage:
    """One way to hurt the newest checkpoint; a file of None means that the side has no such file."""

    what: str
    hf_file: str | None
    our_file: str | None
    hurt: Callable[[Path], None]


def _from_before(path: Path) -> None:
    """The same file of the checkpoint before."""
    here = checkpoints(path.parent.parent)
    shutil.copy(here[-2] / path.name, path)


def _pickle_bomb(path: Path) -> None:
    torch.save({"state": _Code(path.parent.parent / "code-was-run")}, path)


def _all_but_folder(path: Path) -> None:
    for file in path.parent.iterdir():
        file.unlink()


MODEL, HF_OPTIMIZER, OUR_OPTIMIZER = "model.safetensors", "optimizer.pt", "optimizer.safetensors"
HF_STATE, OUR_STATE = "trainer_state.json", "state.json"
DAMAGES = (
    Damage("nothing (for comparison)", MODEL, MODEL, lambda _path: None),
    Damage("one bit flipped in the weights", MODEL, MODEL, flip_bit),
    Damage("one bit flipped in the optimizer file", HF_OPTIMIZER, OUR_OPTIMIZER, flip_bit),
    Damage("weights cut in half", MODEL, MODEL, halve),
    Damage("optimizer file cut in half", HF_OPTIMIZER, OUR_OPTIMIZER, halve),
    Damage("optimizer file missing", HF_OPTIMIZER, OUR_OPTIMIZER, Path.unlink),
    Damage("scheduler file missing", "scheduler.pt", None, Path.unlink),
    Damage("RNG file missing", "rng_state.pth", None, Path.unlink),
    Damage("state file missing", HF_STATE, OUR_STATE, Path.unlink),
    Damage("manifest missing", None, "manifest.json", Path.unlink),
    Damage("weights of the checkpoint before", MODEL, MODEL, _from_before),
    Damage("optimizer file of the checkpoint before", HF_OPTIMIZER, OUR_OPTIMIZER, _from_before),
    Damage("state file of the checkpoint before", HF_STATE, OUR_STATE, _from_before),
    Damage("folder is empty", MODEL, MODEL, _all_but_folder),
    Damage("optimizer file is a pickle with code", HF_OPTIMIZER, OUR_OPTIMIZER, _pickle_bomb),
)


def damaged(bench: Bench, job: Job, folder: Path, kill_at: int) -> list[dict[str, Any]]:
    """Each damage on a copy of the same killed run, then a resume as a user asks for it."""
    truth = reference(bench, job, folder / "truth")
    hurt_dir = folder / "killed"
    bench.run(job, hurt_dir, kill_at=kill_at, kill_wait_s=SETTLE_S)
    rows: list[dict[str, Any]] = []
    usual: Counter[str] = Counter()
    for damage in DAMAGES:
        name = damage.hf_file if bench.side == "HF Trainer" else damage.our_file
        if name is None:
            rows.append({"damage": damage.what, bench.side: "has no such file"})
            continue
        # Every resume happens in the same place, as a user's would.
        run_dir = folder / "run"
        shutil.copytree(hurt_dir, run_dir)
        damage.hurt(checkpoints(run_dir)[-1] / name)
        resumed = bench.run(job, run_dir, resume=True)
        if damage is DAMAGES[0]:
            usual = resumed.warned
        rows.append({"damage": damage.what, bench.side: _verdict(resumed, truth, run_dir, usual, kill_at)})
        shutil.rmtree(run_dir)
    return rows


def _verdict(resumed: Story, truth: Reference, run_dir: Path, usual: Counter[str], kill_at: int) -> str:
    """One cell: refused, went on with or without a word, and whether what came out is right."""
    code = "; THE CODE WAS RUN" if (run_dir / "code-was-run").exists() else ""
    if resumed.error is not None:
        return f"refuses: {plain(resumed.error, run_dir)}{code}"
    new = resumed.warned - usual
    said = f"says {plain(', '.join(sorted(new)), run_dir)}" if new else "says nothing"
    result = "exact" if is_exact(resumed, truth, run_dir) else "**result differs**"
    began = resumed.began if resumed.began is not None else kill_at
    return f"goes on from step {began}, {said}: {result}{code}"


# --- Full disk -------------------------------------------------------------------------------------------------


def full_disk(bench: Bench, job: Job, folder: Path, full_at: int, room_at: int | None) -> dict[str, Any]:
    """No file can grow over 256 KiB from step ``full_at`` on, until ``room_at``; then a resume with room."""
    name = "stays full" if room_at is None else f"full from step {full_at} to {room_at}"
    truth = reference(bench, job, folder / "truth")
    expected = files_of(checkpoints(truth.run_dir)[-1])
    run_dir = folder / ("full" if room_at is None else "room")
    told = bench.run(job, run_dir, full_at=full_at, full_until=room_at)
    here = checkpoints(run_dir)
    whole = [p.name for p in here if torn(p, expected) is None]
    row = {
        "trainer": bench.side,
        "disk": name,
        "run": "finishes" if told.finished else f"ends: {plain(told.error or told.ended, run_dir)}",
        "last step": f"{told.last} of {truth.told.last}",
        "exact": is_exact(told, truth, run_dir) if told.finished else "-",
        "torn folders": len(here) - len(whole),
        "whole checkpoints": ", ".join(whole) or "none",
        "said": ", ".join(sorted({e["code"] for e in told.of("finding") if e["severity"] != "note"})) or "-",
    }
    if not told.finished:
        row |= _with_room(bench, truth, run_dir, told, whole)
    return row


def _with_room(bench: Bench, truth: Reference, run_dir: Path, told: Story, whole: list[str]) -> dict[str, Any]:
    """A resume when there is room again, as a user asks for it; by hand where that fails."""
    resumed, said = bench.run(truth.job, run_dir, resume=True), ""
    if resumed.error is not None and whole:
        said = f"fails: {plain(resumed.error, run_dir)}; by hand from {whole[-1]}: "
        resumed = bench.run(truth.job, run_dir, resume=str(run_dir / whole[-1]))
    said += plain(resumed.error, run_dir) if resumed.error is not None else ""
    if resumed.error is None:
        said += "exact" if is_exact(resumed, truth, run_dir) else "differs"
    return {"resume with room": said, "steps done again": done_again(told, resumed)}


# --- Formats ---------------------------------------------------------------------------------------------------


def _spy(probe: Probe) -> None:
    """Note every ``torch.load`` and everything that a pickle imports."""
    real = torch.load

    def load(file: Any, *args: Any, **kwargs: Any) -> Any:
        name = Path(file).name if isinstance(file, (str, os.PathLike)) else type(file).__name__
        probe.note(event="torch.load", file=name, weights_only=kwargs.get("weights_only"))
        return real(file, *args, **kwargs)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":
            probe.note(event="unpickled", name=f"{args[0]}.{args[1]}")

    torch.load = load
    sys.addaudithook(audit)


def kind_of(path: Path) -> str:
    """What a file is, from its content."""
    if path.suffix == ".safetensors":
        return "safetensors"
    if zipfile.is_zipfile(path) and any(n.endswith("data.pkl") for n in zipfile.ZipFile(path).namelist()):
        return "pickle (torch.save)"
    try:
        json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError):
        return "text" if path.suffix in {".md", ".jinja", ".txt"} else "other"
    return "JSON"


def formats(bench: Bench, job: Job, folder: Path, kill_at: int) -> list[dict[str, Any]]:
    """Every file of a checkpoint, its format, and whether a resume unpickles it."""
    run_dir = folder / "run"
    bench.run(replace(job, keep=None), run_dir, kill_at=kill_at, kill_wait_s=SETTLE_S)
    files = {p.name: kind_of(p) for p in sorted(checkpoints(run_dir)[-1].iterdir())}
    resumed = bench.run(job, run_dir, resume=True, before=_spy)
    loads = {e["file"]: f"weights_only={e['weights_only']}" for e in resumed.of("torch.load")}
    free = sorted({e["name"] for e in resumed.of("unpickled")})
    by_kind: dict[str, list[str]] = {}
    for name, kind in files.items():
        by_kind.setdefault(kind, []).append(name)
    return [
        {
            "trainer": bench.side,
            "format": kind,
            "files": ", ".join(names),
            "torch.load at resume": ", ".join(f"{n} ({loads[n]})" for n in names if n in loads) or "none",
            "classes imported by unrestricted unpickling": ", ".join(free) or "none",
        }
        for kind, names in sorted(by_kind.items())
    ]
