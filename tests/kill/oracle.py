"""What an uninterrupted run gives, and in what another one differs from it: bit for bit, times apart.

Checkpoints are verified here by hand, not by the code under test.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finitune.core.journal import read

# Fields of a record that tell when, how fast or on which line of the file, not what.
_TIMES = frozenset({"time", "time_s", "stall_s", "crc", "sum", "seq", "number", "schema"})
_TOTALS = ("steps", "updates", "skipped", "overflows", "train_loss", "eval_after", "supervised_tokens")
_NEEDED = ("optimizer.safetensors", "state.json")

Key = tuple[Any, ...]
Records = dict[Key, dict[str, Any]]


@dataclass(frozen=True)
class Truth:
    """What a finished run left behind."""

    steps: Records
    """Step records by (step, loss scale): a step that was tried at several scales has several."""
    evals: Records
    marks: Records
    """Journalled digests of the training state, by attempt."""
    totals: dict[str, Any]
    final: dict[str, Any]
    """SHA-256 of the files of the trained model; PEFT's configuration as it is."""
    checkpoint: dict[str, str]
    """SHA-256 of weights, moments and state of the last checkpoint."""

    @classmethod
    def of(cls, run_dir: Path) -> Truth:
        """Read a finished run."""
        records = list(read(run_dir / "journal.jsonl"))
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        last = next(reversed(checkpoints(run_dir)), None)
        return cls(
            last_of(records, "step", "step", "loss_scale"),
            last_of(records, "eval", "step"),
            last_of(records, "state", "attempt"),
            {key: summary.get(key) for key in _TOTALS},
            _meaning(run_dir / "final"),
            {} if last is None else {n: d for n, d in digests(last).items() if _is_state(n)},
        )


def _is_state(name: str) -> bool:
    return name.endswith(".safetensors") or name == "state.json"


def last_of(records: list[dict[str, Any]], kind: str, *key: str) -> Records:
    """The last record of a kind for every key, without its times."""
    return {tuple(r.get(k) for k in key): untimed(r) for r in records if r["kind"] == kind}


def untimed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what tells the time."""
    return {k: v for k, v in record.items() if k not in _TIMES}


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its name there."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _meaning(folder: Path) -> dict[str, Any]:
    """The same, but PEFT's configuration by its values: it writes the names of the adapted modules in another order
    every time, as the set that they are (and the manifest beside it follows).
    """
    found: dict[str, Any] = {**digests(folder)}
    path = folder / "adapter_config.json"
    if path.is_file():
        record = json.loads(path.read_text(encoding="utf-8"))
        found[path.name] = {k: sorted(v) if isinstance(v, list) else v for k, v in record.items()}
        found.pop("manifest.json", None)
    return found


def checkpoints(run_dir: Path) -> list[Path]:
    """Everything that bears the name of a checkpoint."""
    return sorted((p for p in run_dir.glob("checkpoint-*") if p.name[11:].isdigit()), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name[11:])


def differences(truth: Truth, run_dir: Path, *, journal_whole: bool = True) -> list[str]:
    """In what a finished run differs from the truth; empty where every bit is the same.

    Where the journal was damaged on purpose, ``journal_whole=False`` lets records be missing in it; those that are
    there are compared all the same.
    """
    try:
        found = Truth.of(run_dir)
    except (OSError, ValueError, KeyError) as error:
        return [f"the run cannot be read: {error!r}"]
    faults = list(_differing("step", truth.steps, found.steps, whole=journal_whole))
    faults += _differing("eval", truth.evals, found.evals, whole=journal_whole)
    # Marks are written after the steps that they are of, and where a run begins again: one may be missing or more.
    both = {key: mark for key, mark in found.marks.items() if key in truth.marks}
    faults += _differing("state digest", truth.marks, both, whole=False)
    faults += _differing("total", truth.totals, found.totals)
    faults += _differing("final", truth.final, found.final)
    if found.checkpoint:
        faults += _differing("last checkpoint", truth.checkpoint, found.checkpoint)
    else:
        faults.append("last checkpoint: there is none")
    return faults + list(_strays(truth, run_dir)) if journal_whole else faults


def _strays(truth: Truth, run_dir: Path) -> Iterator[str]:
    """Step records that were overwritten by later ones and differ: no try of a step may come out another way."""
    for record in read(run_dir / "journal.jsonl"):
        if record["kind"] != "step":
            continue
        true = truth.steps.get((record.get("step"), record.get("loss_scale")))
        if true is None or any(true.get(k) != v for k, v in untimed(record).items()):
            yield f"an earlier record of step {record.get('step')} differs"


def _differing(what: str, true: Mapping[Any, Any], found: Mapping[Any, Any], *, whole: bool = True) -> Iterator[str]:
    for key in true if whole else true.keys() & found.keys():
        if key not in found:
            yield f"{what} {key}: missing"
        elif true[key] != found[key]:
            yield f"{what} {key}: {_first_difference(true[key], found[key])}"
    yield from (f"{what} {key}: not in the uninterrupted run" for key in found.keys() - true.keys())


def _first_difference(true: Any, found: Any) -> str:
    if isinstance(true, dict) and isinstance(found, dict):
        names = [n for n in {**true, **found} if true.get(n, "absent") != found.get(n, "absent")]
        return f"{names[0]} is {found.get(names[0], 'absent')!r}, should be {true.get(names[0], 'absent')!r}"
    return f"is {found!r}, should be {true!r}"


def unreadable(run_dir: Path) -> list[str]:
    """Checkpoints, and the trained model, that are there by name and are not whole."""
    faults = [f"{folder.name}: {fault}" for folder in checkpoints(run_dir) for fault in faults_of(folder)]
    final = run_dir / "final"
    if final.exists() and not (
        any(final.glob("*.safetensors")) and any(final.glob("*config.json")) and (final / "tokenizer.json").exists()
    ):
        faults.append("final: not complete")
    return faults


def faults_of(folder: Path) -> list[str]:
    """What is wrong with a checkpoint by its manifest."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files: dict[str, Any] = manifest["files"]
        step = manifest["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"no manifest ({error!r})"]
    found = digests(folder)
    faults = [f"{name} differs from the manifest" for name, f in files.items() if found.get(name) != f["sha256"]]
    faults += [f"{name} is not in the manifest" for name in _NEEDED if name not in files]
    return faults + ([] if step == _step(folder) else [f"manifest of step {step}"])


def leftovers(run_dir: Path) -> list[str]:
    """Aside files and folders of deaths that nobody cleared away."""
    names = sorted(p.relative_to(run_dir).as_posix() for p in run_dir.rglob(".*"))
    return [name for name in names if name.endswith((".tmp", ".old")) or ".tmp/" in name]
