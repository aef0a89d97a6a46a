"""Reading safetensors, and the scan that every tensor passes before it becomes a model.

Nothing is unpickled: a folder that has only pickles is refused with the way out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from finitune.core.errors import UserError, raise_all
from finitune.models.codes import MISSING_SHARD, NO_WEIGHTS, PICKLE_ONLY, UNREADABLE_WEIGHTS
from finitune.models.family import StateDict

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
HALF_MAX = 65504.0
"""Largest finite fp16 number (IEEE 754 binary16)."""
_SHOWN = 5


def shown(items: Iterable[str]) -> str:
    """The first few items for a message."""
    listed = list(items)
    more = f", ... ({len(listed) - _SHOWN} more)" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def listing(folder: Path) -> str:
    """What a folder holds, for a message."""
    return shown(sorted(p.name for p in folder.iterdir())) or "-"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the single one, or all that the index names.

    Raises:
        UserError: no weights (MOD006), only pickles (MOD007), an index that cannot be read (MOD008) or
            that names absent files (MOD009).
    """
    if (folder / INDEX).is_file():
        return _indexed_files(folder)
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UserError(PICKLE_ONLY, str(folder), found=shown(pickles))
    raise UserError(NO_WEIGHTS, str(folder), found=listing(folder))


def _indexed_files(folder: Path) -> list[Path]:
    path = folder / INDEX
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(UNREADABLE_WEIGHTS, str(path), num_bytes=path.stat().st_size, reason=repr(error)) from error
    # Names come from a file that was written elsewhere: none may lead out of the folder.
    absent = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if absent:
        raise UserError(MISSING_SHARD, str(path), num=len(absent), names=shown(absent))
    return [folder / name for name in names]


def read_state(files: Iterable[Path]) -> StateDict:
    """All tensors by name, on the CPU, in the dtype they are stored in, in memory of their own.

    Raises UserError MOD008 for each file that is cut short or no safetensors file.
    """
    state: StateDict = {}
    errors: list[UserError] = []
    for path in files:
        try:
            with safe_open(str(path), framework="pt", device="cpu") as handle:
                # The reader maps the file; a copy does not change when the file does.
                state |= {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            num_bytes = path.stat().st_size if path.exists() else 0
            errors.append(UserError(UNREADABLE_WEIGHTS, str(path), num_bytes=num_bytes, reason=str(error)))
    raise_all(errors)
    return state


@dataclass(frozen=True, slots=True)
class Scan:
    """What one pass over the tensors found. Each entry of the lists is "name[index] = value"."""

    dtypes: Mapping[str, int]
    """Number of tensors by dtype."""
    non_finite: tuple[str, ...]
    beyond_half: tuple[str, ...]
    """Finite, but beyond the largest fp16 number."""


def scan(state: Mapping[str, torch.Tensor]) -> Scan:
    """Look at every floating tensor once (``aminmax`` keeps NaN and inf and is one pass)."""
    non_finite: list[str] = []
    beyond: list[str] = []
    for name, tensor in state.items():
        amax = _amax(tensor)
        if not amax < float("inf"):
            non_finite.append(_first(name, tensor, ~torch.isfinite(tensor)))
        elif amax > HALF_MAX:
            beyond.append(_first(name, tensor, tensor.abs() > HALF_MAX))
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in state.values())
    return Scan(dict(dtypes), tuple(non_finite), tuple(beyond))


def _amax(tensor: torch.Tensor) -> float:
    """Largest magnitude; NaN and inf are kept; 0 where there is nothing to measure."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return 0.0
    wide = tensor if tensor.element_size() > 1 else tensor.float()  # 8-bit floats have no aminmax
    low, high = wide.detach().aminmax()
    return float(torch.maximum(-low, high))  # maximum, unlike Python's max, keeps NaN


def _first(name: str, tensor: torch.Tensor, mask: torch.Tensor) -> str:
    index = tuple(mask.nonzero()[0].tolist())
    return f"{name}[{', '.join(map(str, index))}] = {float(tensor[index]):g}"
