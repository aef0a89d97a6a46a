"""Checkpoints: the training state on disk, whole or absent.

    checkpoint-N/
      adapter_model.safetensors | model.safetensors   loadable by peft / transformers as it stands
      optimizer.safetensors                            moments, named <parameter>|<slot>
      state.json                                       cursor, schedule, scaler, statistics
      manifest.json                                    size and SHA-256 of every file above, and what the run was
      trusted.json                                     once enough clean steps have followed

A state with a non-finite weight or moment is refused. The folder is written aside, flushed and renamed; a save that
fails leaves nothing behind and touches nothing that was there. Nothing here needs unpickling. A checkpoint is a
*candidate* until it is *trusted*: a fault that is already in the state may need some steps to be seen.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from finitune.core import journal
from finitune.core.errors import Halted
from finitune.core.files import atomic_folder, file_digest, read_manifest, verify_manifest, write_atomic, write_manifest
from finitune.core.journal import encode
from finitune.core.types import Finding
from finitune.core.units import bytes_text
from finitune.engine.codes import CHECKPOINT_BAD, SAVE_FAILED, STATE_NOT_FINITE
from finitune.engine.conditions import AS_CONFIGURED
from finitune.engine.line import line_of
from finitune.engine.port import Port
from finitune.models.save import write_model
from finitune.numerics.fingerprint import RECORD, UNKNOWN, fingerprint, first_difference
from finitune.numerics.norms import bad_names, tensor_norms
from finitune.train import optim
from finitune.train.state import SCHEMA, conditions_of
from finitune.train.step import Parts, TrainPort
from finitune.train.stored import stored_weights

PREFIX = "checkpoint-"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
TRUSTED_FILE = "trusted.json"
MANIFEST_FILE = "manifest.json"
_JOURNAL_FILE = "journal.jsonl"
_NUMBER = re.compile("0|[1-9][0-9]{0,17}")


@dataclass(frozen=True, slots=True)
class Content:
    """What a checkpoint is made of."""

    tensors: Mapping[str, torch.Tensor]
    """Trainable weights and moments by name, as :meth:`TrainPort.state_tensors` gives them."""
    record: Mapping[str, Any]
    line: int = 0
    """How often the run had gone back when it was written."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    journal: str = ""
    """The journal's last checksum when it was begun: a later end of the journal that lacks this line was cut."""

    @property
    def step(self) -> int:
        """Batches used up."""
        return int(self.record["step"])

    @property
    def num_bytes(self) -> int:
        """About what it takes on the disk."""
        return sum(t.nbytes for t in self.tensors.values())


def refuse_non_finite(tensors: Iterable[tuple[str, torch.Tensor]], run: str, step: int) -> None:
    """Raise Halted where a weight or moment of the state is not finite."""
    named = dict(tensors)
    suspects = bad_names(list(named), tensor_norms(list(named.values())))
    # The square of a finite number beyond 1.8e19 overflows a norm: only what is not finite itself is refused.
    bad = [name for name in suspects if not bool(torch.isfinite(named[name]).all())]
    if bad:
        raise Halted(STATE_NOT_FINITE, run, count=len(bad), first=bad[0], step=step, run=run)


def write(content: Content, parts: Parts, tokenizer: Any, run_dir: Path) -> Path:
    """Write ``checkpoint-<step>``; its path. May run in a thread of its own.

    One that stands there already with the same state is left as it is. Raises Halted (non-finite), OSError (disk).
    """
    refuse_non_finite(content.tensors.items(), str(run_dir), content.step)
    target = run_dir / f"{PREFIX}{content.step}"
    mark = fingerprint(content.tensors.items(), content.record)
    if _holds(target, mark.digest, content.line):
        return target
    if not run_dir.is_dir():
        raise FileNotFoundError(2, "the run folder has vanished", str(run_dir))
    trained = dict(parts.parameters)
    weights = {n: t for n, t in content.tensors.items() if n in trained}
    moments = {n: t.detach().to("cpu").contiguous() for n, t in content.tensors.items() if n not in trained}
    with atomic_folder(target) as folder:
        write_model(parts.model, tokenizer, folder, family=parts.family, weights=weights)
        save_file(moments, str(folder / OPTIMIZER_FILE))
        text = json.dumps(encode(content.record), indent=1, allow_nan=False)
        (folder / STATE_FILE).write_text(text, encoding="utf-8")
        counters = {key: content.record[key] for key in ("step", "updates", "attempt")}
        counters |= {"line": content.line, "journal": content.journal, "state": mark.to_json()}
        write_manifest(folder, {**counters, "facts": encode(content.facts)})
    return target


def _holds(folder: Path, digest: str, line: int) -> bool:
    """Whether this very state stands there, whole."""
    if not folder.is_dir() or verify_manifest(folder, beside=(TRUSTED_FILE,)):
        return False
    manifest = read_manifest(folder)
    state = manifest.get("state")
    return isinstance(state, dict) and state.get("digest") == digest and manifest.get("line") == line


def save_failure(target: Path, error: OSError, needed_bytes: int) -> Finding:
    """The Finding of a save that the disk refused."""
    needed = bytes_text(needed_bytes)
    return SAVE_FAILED.find(str(target), path=str(target), error=str(error), free=free_text(target), needed=needed)


def free_text(target: Path) -> str:
    """Free space where ``target`` would stand."""
    try:
        return bytes_text(shutil.disk_usage(target.parent).free)
    except OSError:
        return "?"


def listed(run_dir: Path) -> list[Path]:
    """Checkpoints of a run, newest first."""
    found = [p for p in run_dir.glob(f"{PREFIX}*") if p.is_dir() and _NUMBER.fullmatch(p.name[len(PREFIX) :])]
    return sorted(found, key=lambda p: int(p.name[len(PREFIX) :]), reverse=True)


def faults_of(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, one sentence each; empty for a good one."""
    faults = verify_manifest(folder, beside=(TRUSTED_FILE,))
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError, RecursionError):
        return faults  # that the manifest is broken is among them
    named, written = folder.name[len(PREFIX) :], manifest.get("step")
    if str(written) != named:
        faults.append(f"{MANIFEST_FILE}: written at step {written}, but the folder is {folder.name}")
    if "self" not in manifest:
        faults.append(f"{MANIFEST_FILE}: no digest of itself")
    for key in ("step", "attempt", "line"):
        if type(manifest.get(key)) is not int:
            faults.append(f"{MANIFEST_FILE}: {key} is {manifest.get(key)!r}, not a number")
    missing = [f for f in (OPTIMIZER_FILE, STATE_FILE) if f not in manifest["files"]]
    return faults + [f"{name}: missing" for name in missing if not any(f.startswith(name) for f in faults)]


def newest_good(run_dir: Path, known: Mapping[Path, str] = MappingProxyType({})) -> tuple[Path | None, list[Finding]]:
    """The newest checkpoint that agrees with its manifest, and a Finding for each that was passed over.

    ``known`` tells what is wrong with checkpoints beyond what their files show.

    Checkpoints of a line that the run has left by going back are no longer part of it.
    """
    findings: list[Finding] = []
    rollbacks = line_of(journal.read(run_dir / _JOURNAL_FILE)).rollbacks if _has_journal(run_dir) else []
    for path in listed(run_dir):
        faults = [known[path]] if path in known else faults_of(path)
        if not faults and on_the_line(path, rollbacks):
            return path, findings
        if faults:
            findings.append(CHECKPOINT_BAD.find(str(path), path=str(path), faults="; ".join(faults)))
    return None, findings


def _has_journal(run_dir: Path) -> bool:
    return (run_dir / _JOURNAL_FILE).is_file()


def on_the_line(folder: Path, rollbacks: list[int]) -> bool:
    """Whether no later rollback went to a step before this (intact) checkpoint."""
    manifest = read_manifest(folder)
    return all(int(manifest["step"]) <= to_step for to_step in rollbacks[int(manifest.get("line", 0)) :])


def load(port: TrainPort, folder: Path) -> None:
    """Restore moments and state from a verified checkpoint (weights were loaded with the model).

    Raises KeyError or ValueError where the checkpoint belongs to another set of parameters, NotPossible where the
    conditions that it was written under cannot be brought about here.
    """
    tensors = load_file(str(folder / OPTIMIZER_FILE))
    record = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    if conditions_of(record) != AS_CONFIGURED:
        # Conditions may give the weights another format than the one that the model was loaded in.
        port.restore(stored_weights(port.parts, folder) | tensors, record)
        return
    optim.check_moments(port.parts.parameters, tensors)
    optim.restore_moments(port.parts.optimizer, port.parts.parameters, tensors)
    port.state.load(record)


def other_than_written(folder: Path, port: TrainPort) -> str | None:
    """Where the port's state, just loaded from ``folder``, is not the one that the checkpoint was written from.

    Files that agree with their manifest may still be of another checkpoint, if somebody changed both. None where all
    is as it was, or where the manifest does not tell; else the file and, in brackets, its first differing tensor.
    """
    state = read_manifest(folder).get("state")
    record = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    if state is None or record.get("schema") != SCHEMA:
        return None  # what an earlier version wrote is read, and is not the same record afterwards
    different = first_difference(state, fingerprint(port.state_tensors(), port.state_record()))
    if different is None:
        return None
    weights = next((p.name for p in sorted(folder.glob("*model*.safetensors"))), "*.safetensors")
    files = {RECORD: STATE_FILE, UNKNOWN: MANIFEST_FILE, "(number of tensors)": OPTIMIZER_FILE}
    file = files.get(different) or (OPTIMIZER_FILE if "|" in different else weights)
    return f"{file} ({different})"


@dataclass(frozen=True, slots=True)
class StoredBase:
    """A checkpoint as a place to start a redo from."""

    folder: Path
    step: int
    attempt: int
    parts: Parts

    def intact(self) -> bool:
        """Whether its files are those that were written."""
        return not faults_of(self.folder)

    def restore(self, port: Port) -> None:
        """Make it the training state."""
        tensors = stored_weights(self.parts, self.folder) | load_file(str(self.folder / OPTIMIZER_FILE))
        port.restore(tensors, json.loads((self.folder / STATE_FILE).read_text(encoding="utf-8")))


def bases(run_dir: Path, rollbacks: list[int], parts: Parts) -> list[StoredBase]:
    """The run's checkpoints that are readable and on its line, newest first."""
    found = []
    for folder in listed(run_dir):
        try:
            manifest = read_manifest(folder)
            if on_the_line(folder, rollbacks):
                found.append(StoredBase(folder, int(manifest["step"]), int(manifest["attempt"]), parts))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def trust(folder: Path, step: int) -> None:
    """Mark a checkpoint as trusted after ``step``. Raises OSError."""
    record = {"schema": 1, "trusted_at_step": step, "manifest_sha256": file_digest(folder / MANIFEST_FILE)}
    write_atomic(folder / TRUSTED_FILE, json.dumps(record).encode())


def is_trusted(folder: Path) -> bool:
    """Whether the mark is there and belongs to this manifest."""
    try:
        record = json.loads((folder / TRUSTED_FILE).read_text(encoding="utf-8"))
        return bool(record["manifest_sha256"] == file_digest(folder / MANIFEST_FILE))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def facts(folder: Path) -> dict[str, Any]:
    """What the run was when the checkpoint was written. Raises OSError or ValueError (no manifest)."""
    found = read_manifest(folder).get("facts", {})
    return found if isinstance(found, dict) else {}


def step_of(folder: Path) -> int:
    """The step a checkpoint was written at."""
    return int(read_manifest(folder)["step"])
