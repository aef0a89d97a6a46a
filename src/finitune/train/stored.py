"""Trainable weights between a live model and the files of a checkpoint.

transformers and PEFT name the tensors in their files as they like (tied weights once, adapters without their
adapter's name). Which file name belongs to which parameter is told by the memory that both names point to.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from finitune.models.lora import adapter_state, is_adapter
from finitune.train.step import Parts

_MOMENTS = "optimizer"


def _place(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape)


def stored_weights(parts: Parts, folder: Path) -> dict[str, torch.Tensor]:
    """The trainable weights in a checkpoint folder, by parameter name.

    Raises KeyError where one is not there, OSError or ValueError where the files are unreadable.
    """
    held: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if not path.name.startswith(_MOMENTS):
            held.update(_read(path))
    model = parts.model
    live: Mapping[str, torch.Tensor] = adapter_state(model) if is_adapter(model) else model.state_dict()
    places = {_place(tensor): held[name] for name, tensor in live.items() if name in held}
    missing = [name for name, parameter in parts.parameters if _place(parameter) not in places]
    if missing:
        raise KeyError(f"{missing[0]} and {len(missing) - 1} more are not in {folder}")
    return {name: places[_place(parameter)] for name, parameter in parts.parameters}


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from error
