"""A run that is over: what its folder says of the end, and whether the result still stands whole."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finitune.core.files import MANIFEST, verify_manifest
from finitune.core.types import Finding
from finitune.train import checkpoint
from finitune.train.codes_resume import ALREADY_FINISHED
from finitune.train.folder import FINAL, SUMMARY_FILE, Place
from finitune.train.observer import Observers
from finitune.train.past import Past
from finitune.train.result import RunResult

_CONFIGS = ("adapter_config.json", "config.json")
_LONGEST_HEADER_BYTES = 100_000_000
_NOT_STORED = ("samples", "run_dir", "final_dir", "findings")


@dataclasses.dataclass(frozen=True, slots=True)
class Finished:
    """Stands for a session of a run in which nothing is left to do."""

    result: RunResult
    finding: Finding
    observers: Observers

    def run(self) -> RunResult:
        """Say so; nothing is trained and nothing is written."""
        self.observers.tell("finding", self.finding)
        self.observers.tell("end", self.result)
        return self.result


def finished(place: Place, past: Past, total_steps: int, observers: Sequence[Any]) -> Finished | None:
    """The finished run, or None where something is left to do: steps, or the end of it (a result that is not whole).

    A length that is not known yet (-1, the recipe counts epochs) leaves something to do.
    """
    end = past.end
    if total_steps < 0 or end is None or end.get("status") != "finished" or final_faults(place.run_dir / FINAL):
        return None
    result = _result(end, place.run_dir)
    if result is None or result.steps < total_steps or _goes_back(place, result.steps):
        return None
    if not _summary_stands(place.run_dir, result.steps):
        return None
    return Finished(result, _finding(result), Observers(list(observers)))


def _summary_stands(run_dir: Path, steps: int) -> bool:
    """Whether the very last thing that a run writes was written."""
    try:
        summary = json.loads((run_dir / SUMMARY_FILE).read_text(encoding="utf-8"))
        return bool(summary["status"] == "finished" and summary["steps"] == steps)
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return False


def _finding(result: RunResult) -> Finding:
    return ALREADY_FINISHED.find(
        "", steps=result.steps, final=result.final_dir, run=result.run_dir, more=2 * max(1, result.steps)
    )


def _goes_back(place: Place, steps: int) -> bool:
    """Whether a checkpoint from before the end was named."""
    if place.chosen is None:
        return False
    try:
        return checkpoint.step_of(place.chosen) < steps
    except (OSError, ValueError, KeyError, TypeError):  # its faults are told where it is used
        return True


def _result(end: Mapping[str, Any], run_dir: Path) -> RunResult | None:
    """The result as the journal's last record has it; None where that is not a whole one."""
    names = [f.name for f in dataclasses.fields(RunResult) if f.name not in _NOT_STORED]
    if any(name not in end for name in names) or not isinstance(end["steps"], int):
        return None
    values: dict[str, Any] = {name: _number(end[name]) for name in names}
    values |= {"run_dir": str(run_dir), "final_dir": str(run_dir / FINAL), "findings": {ALREADY_FINISHED.code: 1}}
    return RunResult(**values)


def _number(value: Any) -> Any:
    """JSON knows no NaN and no infinity; the journal spells them."""
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def final_faults(folder: Path) -> list[str]:
    """What is wrong with the trained model; empty where it is there and whole.

    Its manifest is asked where it has one; else every weights file must be as long as its own header says.
    """
    if (folder / MANIFEST).is_file():
        return verify_manifest(folder)
    try:
        return list(_plain_faults(folder))
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError) as error:
        return [f"{folder.name}: {error!r}"]


def _plain_faults(folder: Path) -> Iterator[str]:
    config = next((folder / name for name in _CONFIGS if (folder / name).is_file()), None)
    if config is None:
        yield f"{folder.name}: no {' or '.join(_CONFIGS)}"
        return
    json.loads(config.read_text(encoding="utf-8"))
    wanted = {path.name for path in folder.glob("*.safetensors")}
    for index in folder.glob("*.safetensors.index.json"):
        wanted |= set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
    if not wanted:
        yield f"{folder.name}: no weights"
    for name in sorted(wanted):
        yield from _weights_faults(folder / name)


def _weights_faults(path: Path) -> Iterator[str]:
    """safetensors: 8 bytes with the length of a JSON header, the header, the tensors, and nothing after them."""
    if not path.is_file():
        yield f"{path.name}: missing"
        return
    size = path.stat().st_size
    with path.open("rb") as handle:
        head = handle.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size - 8, _LONGEST_HEADER_BYTES):
            yield f"{path.name}: cut short"
            return
        header = json.loads(handle.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if 8 + length + max(ends, default=0) != size:
        yield f"{path.name}: {size} bytes, expected {8 + length + max(ends, default=0)}"
