"""The facts of a run: everything that its bits depend on, small enough to lie in every checkpoint.

A later resume compares them with what it would go on with (``train/changes.py``). The recipe is in them as it was
resolved; rows and weights are in them as digests, so that the same content under another path is the same.
"""

from __future__ import annotations

import glob
import hashlib
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from finitune.data.collate import Batch
from finitune.train.prepare import Prepared
from finitune.train.recipe import Recipe
from finitune.train.result import versions

SCHEMA = 1
# So many elements of each frozen tensor are read: another training changes nearly all of them.
_SAMPLED_ELEMENTS = 4096


def facts_of(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    """The facts of a prepared run, JSON-able."""
    parts = prepared.port.parts
    trained = {name for name, _ in parts.parameters}
    frozen = [(n, p) for n, p in parts.model.named_parameters() if n not in trained]
    eval_batches = prepared.eval_batches
    return {
        "schema": SCHEMA,
        "recipe": resolved(recipe, prepared).model_dump(mode="json"),
        "data": {
            "digest": prepared.data_digest,
            "rows": len(parts.loader.dataset),
            "steps_per_epoch": parts.loader.steps_per_epoch(0),
            "eval_digest": _eval_digest(eval_batches),
            "eval_rows": sum(len(b.row_ids) for b in eval_batches),
        },
        **machine(prepared.device),
        "world_size": parts.strategy.world_size,
        "precision": prepared.precision,
        "total_steps": prepared.plan.total_steps,
        "trainable": _form(parts.parameters),
        "frozen": {**_form(frozen), "form": _form(frozen, with_dtype=True)["digest"], "digest": _sampled(frozen)},
    }


def resolved(recipe: Recipe, prepared: Prepared) -> Recipe:
    """The recipe with everything that was derived written out, so that it runs the same again from anywhere."""
    data, model = recipe.data, recipe.model
    return recipe.model_copy(
        update={
            "precision": prepared.precision,
            "fp16": None,
            "bf16": None,
            "device": str(prepared.device),
            "max_steps": prepared.plan.total_steps,
            "data": data.model_copy(
                update={"train": _absolute(data.train), "eval": None if data.eval is None else _absolute(data.eval)}
            ),
            "model": model.model_copy(
                update={"name_or_path": _absolute(model.name_or_path), "chat_template": _absolute(model.chat_template)}
            ),
        }
    )


def _absolute(paths: Any) -> Any:
    """Paths that exist as absolute ones; names of models and sources, and templates, as they are."""
    if isinstance(paths, list):
        return [_absolute(path) for path in paths]
    if not isinstance(paths, str):
        return paths
    pattern = any(c in paths for c in "*?[")
    return os.path.abspath(paths) if os.path.exists(paths) or (pattern and glob.glob(paths)) else paths


def machine(device: torch.device) -> dict[str, Any]:
    """Versions, device and threads: what the same recipe may round differently on."""
    return {
        "versions": {**versions(), "tokenizers": _version("tokenizers")},
        "device": {"type": device.type, "name": device_name(device)},
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"


def device_name(device: torch.device) -> str:
    """The model of the device; of a CPU with the instruction set that torch uses of it."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    if device.type != "cpu":
        return device.type
    return f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"


def cpu_name(source: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model name where Linux tells it, else what Python knows of it."""
    try:
        lines = source.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return found or platform.processor() or platform.machine()


def _form(parameters: Iterable[tuple[str, torch.Tensor]], *, with_dtype: bool = False) -> dict[str, Any]:
    """Number of tensors and parameters, and a digest of names and shapes (and number formats)."""
    named = list(parameters)
    lines = [f"{name} {tuple(p.shape)} {p.dtype if with_dtype else ''}" for name, p in named]
    digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()
    return {"tensors": len(named), "parameters": sum(p.numel() for _, p in named), "digest": digest}


@torch.no_grad()
def _sampled(parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Digest of evenly spaced elements of each tensor, bit for bit."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in parameters:
        flat = parameter.detach().reshape(-1)
        elements = flat[:: max(1, flat.numel() // _SAMPLED_ELEMENTS)].to("cpu").contiguous()
        digest.update(name.encode())
        digest.update(elements.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _eval_digest(batches: Iterable[Batch]) -> str:
    """Digest of the held-out rows, in whatever order and batches they are evaluated."""
    batches = list(batches)
    rows = sorted(f"{row.digest}" for batch in batches for row in batch.row_ids)
    sizes = f"{sum(b.num_tokens for b in batches)} {sum(b.num_supervised for b in batches)}"
    return hashlib.sha256("\n".join([sizes, *rows]).encode()).hexdigest()
