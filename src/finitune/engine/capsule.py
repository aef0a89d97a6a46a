"""Capsules: one failing step in a folder, to be computed again anywhere.

incidents/NNN/
    incident.json          the incident as it stands
    capsule/
        manifest.json      size and digest of every file
        capsule.json       numbers, rows, state record, kernels, versions
        recipe.yaml        the recipe, where the run had one
        tensors.safetensors

Weights: "full" every weight and buffer; "delta" the training state, of each tensor only the rows that differ from the
model training began from; "lora" the training state (what is trained, and moments); "digest" nothing but fingerprints;
"auto" is "lora" up to a limit of bytes, else "digest". Rows: "full", or "ids" without any token.

Written whole or not at all; no pickle, no code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finitune.core.chain import encode
from finitune.core.files import atomic_folder, write_atomic, write_manifest
from finitune.core.incident import Incident
from finitune.engine.capsule_nest import pack
from finitune.engine.capsule_tensors import write_tensors
from finitune.engine.capture import Captured, frozen_tensors
from finitune.engine.conditions import NotPossible
from finitune.engine.port import ReplayPort
from finitune.numerics.statecheck import bad_tensors

SCHEMA = 1
INCIDENTS = "incidents"
INCIDENT_FILE = "incident.json"
FOLDER = "capsule"
CAPSULE_FILE = "capsule.json"
RECIPE_FILE = "recipe.yaml"
TENSORS_FILE = "tensors.safetensors"
ROWS = ("full", "ids")
WEIGHTS = ("full", "delta", "lora", "digest")
BATCH, STATE, FROZEN, PLACES = "batch", "state/", "frozen/", "places/"
"""How names of tensors begin."""

Base = Callable[[], Mapping[str, torch.Tensor]]
"""Gives the weights that training began from, by name."""


@dataclass(frozen=True, slots=True)
class CapsuleOptions:
    """What goes into a capsule."""

    rows: str = "full"
    """"full", or "ids": token tensors are left out, row ids and shapes remain."""
    weights: str = "auto"
    """"full", "delta", "lora", "digest", or "auto"."""
    limit_bytes: int = 256 << 20
    """"auto" stores the training state up to this size."""

    def __post_init__(self) -> None:
        if self.rows not in ROWS or self.weights not in (*WEIGHTS, "auto"):
            raise ValueError(f"no such capsule: rows={self.rows}, weights={self.weights}")


def incident_folder(run_dir: Path, number: int) -> Path:
    """Where an incident of a run lies."""
    return run_dir / INCIDENTS / f"{number:03d}"


def write_incident(folder: Path, incident: Incident) -> Path:
    """``incident.json``; written again whenever the incident has moved on. Raises OSError."""
    path = folder / INCIDENT_FILE
    content = json.dumps(encode(incident.to_json()), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(path, content.encode("utf-8", "backslashreplace"))
    return path


def write_capsule(
    folder: Path,
    captured: Captured,
    port: ReplayPort,
    incident: Incident,
    options: CapsuleOptions | None = None,
    *,
    recipe: str | None = None,
    checkpoint: str | None = None,
    base: Base | None = None,
) -> Path:
    """``folder/capsule``, of the port's present state (the one before the step).

    Args:
        folder: of the incident; see :func:`incident_folder`.
        captured: the step at hand.
        port: gives the weights.
        incident: what the capsule reproduces.
        options: what goes in.
        recipe: YAML of the resolved recipe; None for a script.
        checkpoint: where the weights can be had else, for people.
        base: the weights that training began from; "delta" needs them.

    Raises OSError where the disk refuses, NotPossible for a batch, or "delta" without a base, that cannot be stored.
    """
    options = options or CapsuleOptions()
    mode = _mode(port, options)
    tensors: dict[str, torch.Tensor] = {}
    batch = [pack(m, f"{BATCH}/{i}", tensors, keep=options.rows == "full") for i, m in enumerate(captured.micros)]
    delta = _put_weights(tensors, port, incident, mode, base)
    content = _content(captured, incident) | {
        "rows": options.rows,
        "weights": mode,
        "delta": delta,
        "kind": "script" if recipe is None else "recipe",
        "checkpoint": checkpoint,
        "batch": batch,
    }
    target = folder / FOLDER
    with atomic_folder(target) as aside:
        _write_files(aside, content, tensors, recipe)
    return target


def _write_files(
    folder: Path, content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], recipe: str | None
) -> None:
    text = json.dumps(encode(content), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / CAPSULE_FILE).write_bytes(text.encode("utf-8", "backslashreplace"))
    if recipe is not None:
        (folder / RECIPE_FILE).write_bytes(recipe.encode("utf-8", "backslashreplace"))
    try:
        write_tensors(folder / TENSORS_FILE, tensors)
    except ValueError as error:
        raise NotPossible(str(error)) from error
    write_manifest(folder, {"capsule": SCHEMA})


def _content(captured: Captured, incident: Incident) -> dict[str, Any]:
    case = captured.case
    return {
        "schema": SCHEMA,
        "step": captured.step,
        "trigger": case.trigger.value,
        "finding": case.finding.to_json(),
        "reading": case.reading.to_json(),
        "expected": captured.expected.to_json(),
        "facts": dict(case.facts),
        "past": dict(case.past),
        "units": [[u.micro, u.index, [str(r) for r in u.rows]] for u in captured.units],
        "record": dict(captured.record),
        "state": captured.state.to_json(),
        "frozen": captured.frozen.to_json(),
        "kernels": dict(captured.kernels),
        "generators": dict(captured.generators),
        "versions": dict(captured.versions),
        "width_tokens": captured.width_tokens,
        "incident": incident.to_json(),
    }


def _mode(port: ReplayPort, options: CapsuleOptions) -> str:
    if options.weights != "auto":
        return options.weights
    size = sum(t.nbytes for _, t in port.state_tensors())
    return "lora" if size <= options.limit_bytes else "digest"


def _put_weights(
    tensors: dict[str, torch.Tensor], port: ReplayPort, incident: Incident, mode: str, base: Base | None
) -> dict[str, list[int]]:
    """Put weights and moments into ``tensors``; the shapes of those of which only some rows are there."""
    if mode == "digest":
        return {}
    tensors.update({FROZEN + n: t for n, t in _frozen(port, incident, everything=mode == "full").items()})
    if mode != "delta":
        tensors.update({STATE + n: t.detach() for n, t in port.state_tensors()})
        return {}
    if base is None:
        raise NotPossible("the model that training began from is not at hand")
    began, shapes = base(), {}
    weights = {name for name, _ in port.parameters()}
    for name, tensor in port.state_tensors():
        was = began.get(name) if name in weights else torch.zeros_like(tensor)
        rows = None if was is None else _changed_rows(tensor.detach(), was.detach().to(tensor.device))
        if rows is None:
            tensors[STATE + name] = tensor.detach()
            continue
        shapes[name] = list(tensor.shape)
        tensors[PLACES + name] = rows
        tensors[STATE + name] = tensor.detach()[rows.to(tensor.device)]
    return shapes


def _changed_rows(tensor: torch.Tensor, was: torch.Tensor) -> torch.Tensor | None:
    """Places along the first dimension, int64, whose bits differ from those at the beginning (of moments: zeros).

    None where storing the whole is as short, or nothing can be compared.
    """
    if tensor.dim() == 0 or not tensor.numel() or was.shape != tensor.shape or was.dtype != tensor.dtype:
        return None
    # Bits, not values: -0 is not 0 here, and a NaN equals itself.
    a, b = (t.contiguous().reshape(len(t), -1).view(torch.uint8) for t in (tensor, was))
    rows = torch.nonzero((a != b).any(dim=1)).flatten().cpu()
    return rows if len(rows) < len(tensor) else None


def _frozen(port: ReplayPort, incident: Incident, *, everything: bool) -> dict[str, torch.Tensor]:
    """Weights and buffers that are not trained: all, or those that the failure may come from."""
    found = {name: t.detach() for name, t in frozen_tensors(port).items()}
    if everything:
        return found
    named = {s.name for s in incident.suspects if s.kind in ("parameter", "buffer")} | set(bad_tensors(found.items()))
    return {name: tensor for name, tensor in found.items() if name in named}
