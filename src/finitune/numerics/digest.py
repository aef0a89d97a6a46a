"""Digests of state: equal digests mean equal bits, over tensors and plain records alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from finitune.core.journal import encode


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    raw: memoryview = flat.view(torch.uint8).numpy().data
    return raw


def digest(tensors: Iterable[tuple[str, torch.Tensor]], record: Mapping[str, Any] | None = None) -> str:
    """SHA-256 over names, dtypes, shapes and raw bits, and over a JSON-able record.

    Bits, not values: -0.0 differs from 0.0 and one NaN pattern from another.
    """
    sha = hashlib.sha256()
    for name, tensor in tensors:
        sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        if tensor.numel():
            sha.update(_bytes_of(tensor))
    if record is not None:
        sha.update(json.dumps(encode(record), sort_keys=True).encode())
    return sha.hexdigest()
