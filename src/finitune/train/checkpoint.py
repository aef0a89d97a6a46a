"""Checkpoints: the training state on disk, whole or absent.

    checkpoint-N/
      adapter_model.safetensors | model.safetensors   loadable by peft / transformers as it stands
      optimizer.safetensors                            moments, named <parameter>|<slot>
      state.json                                       cursor, schedule, scaler, statistics
      manifest.json                                    size and SHA-256 of every file above

A state with a non-finite weight or moment is refused. The folder is written aside, flushed and renamed;
a save that fails leaves nothing behind and touches nothing that was there. Nothing here needs unpickling.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from finitune.core.errors import Halted
from finitune.core.files import atomic_folder, read_manifest, verify_manifest, write_manifest
from finitune.core.journal import encode
from finitune.core.types import Finding
from finitune.core.units import bytes_text
from finitune.engine.codes import CHECKPOINT_BAD, SAVE_FAILED, STATE_NOT_FINITE
from finitune.models.save import write_model
from finitune.numerics.norms import bad_names, tensor_norms
from finitune.train import optim
from finitune.train.step import TrainPort

PREFIX = "checkpoint-"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"


def refuse_non_finite(port: TrainPort, run: str) -> None:
    """Raise Halted where a weight or moment of the state is not finite."""
    named = list(port.state_tensors())
    bad = bad_names([n for n, _ in named], tensor_norms([t for _, t in named]))
    if bad:
        raise Halted(STATE_NOT_FINITE, run, count=len(bad), first=bad[0], step=port.state.step, run=run)


def save(port: TrainPort, tokenizer: Any, run_dir: Path) -> Path | Finding:
    """Write ``checkpoint-<step>``; its path, or a Finding where the disk refused. Raises Halted (non-finite)."""
    refuse_non_finite(port, str(run_dir))
    target = run_dir / f"{PREFIX}{port.state.step}"
    named = optim.moments(port.parts.optimizer, port.parts.parameters)
    tensors = {key: value.detach().to("cpu").contiguous() for key, value in named}
    try:
        with atomic_folder(target) as folder:
            write_model(port.parts.model, tokenizer, folder, family=port.parts.family)
            save_file(tensors, str(folder / OPTIMIZER_FILE))
            record = json.dumps(encode(port.state_record()), indent=1, allow_nan=False)
            (folder / STATE_FILE).write_text(record, encoding="utf-8")
            write_manifest(folder, {"step": port.state.step, "updates": port.state.updates})
    except OSError as error:
        return save_failure(target, error, sum(t.nbytes for _, t in port.state_tensors()))
    return target


def save_failure(target: Path, error: OSError, needed_bytes: int) -> Finding:
    """The Finding of a save that the disk refused."""
    try:
        free = bytes_text(shutil.disk_usage(target.parent).free)
    except OSError:
        free = "?"
    return SAVE_FAILED.find(str(target), path=str(target), error=str(error), free=free, needed=bytes_text(needed_bytes))


def listed(run_dir: Path) -> list[Path]:
    """Checkpoints of a run, newest first."""
    found = [p for p in run_dir.glob(f"{PREFIX}*") if p.is_dir() and p.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=lambda p: int(p.name[len(PREFIX) :]), reverse=True)


def newest_good(run_dir: Path) -> tuple[Path | None, list[Finding]]:
    """The newest checkpoint that agrees with its manifest, and a Finding for each that was passed over."""
    findings: list[Finding] = []
    for path in listed(run_dir):
        faults = verify_manifest(path)
        if not faults:
            return path, findings
        findings.append(CHECKPOINT_BAD.find(str(path), path=str(path), faults="; ".join(faults[:3])))
    return None, findings


def load(port: TrainPort, folder: Path) -> None:
    """Restore moments and state from a verified checkpoint (weights were loaded with the model).

    Raises KeyError or ValueError where the checkpoint belongs to another set of parameters.
    """
    tensors = load_file(str(folder / OPTIMIZER_FILE))
    optim.load_moments(port.parts.optimizer, port.parts.parameters, tensors)
    port.state.load(json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))


def rotate(run_dir: Path, keep: int) -> None:
    """Remove the oldest checkpoints beyond ``keep``; the newest one always stays."""
    for path in listed(run_dir)[max(1, keep) :]:
        shutil.rmtree(path, ignore_errors=True)


def step_of(folder: Path) -> int:
    """The step a checkpoint was written at."""
    return int(read_manifest(folder)["step"])
