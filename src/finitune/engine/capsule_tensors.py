"""Tensors of a capsule in the safetensors format, read without trust.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, place of the bytes)
and the bytes. The header of a stranger's file may say anything: it is compared with the size of the file, number by
number, before memory is taken for any tensor.

Source: https://github.com/huggingface/safetensors (README, "Format")
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeGuard

import torch

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 64 << 20
_MAX_TENSORS = 200_000
_MAX_DIMENSIONS = 16
_METADATA = "__metadata__"


class BadTensors(ValueError):
    """The file is not what its header says; the text says where."""


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors from any device. Raises OSError, and ValueError for a dtype that the format does not have."""
    header: dict[str, Any] = {}
    place = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name}: {tensor.dtype} cannot be stored")
        end = place + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            if tensor.numel():
                handle.write(_bytes_of(tensor))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, on the CPU. Raises OSError, and BadTensors where header and bytes disagree."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        header = _header(handle, size)
        start = handle.tell()
        _check(header, size - start)
        return {name: _tensor(handle, start, entry) for name, entry in header.items()}


def _header(handle: BufferedReader, size: int) -> dict[str, Any]:
    head = handle.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
        raise BadTensors(f"a header of {length} bytes in a file of {size} bytes")
    try:
        header = json.loads(handle.read(length).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadTensors(f"its header is not JSON ({type(error).__name__})") from error
    if not isinstance(header, dict):
        raise BadTensors("its header is not a table of tensors")
    header.pop(_METADATA, None)
    if len(header) > _MAX_TENSORS:
        raise BadTensors(f"{len(header)} tensors are too many")
    return header


def _check(header: Mapping[str, Any], num_bytes: int) -> None:
    """Raise BadTensors unless the tensors fill the bytes exactly, one after the other."""
    places = sorted((_place(name, entry) for name, entry in header.items()), key=lambda p: p[:2])
    end = 0
    for start, stop, name in places:
        if start != end:
            raise BadTensors(f"{name!a} begins at byte {start}, where {end} is expected")
        end = stop
    if end != num_bytes:
        raise BadTensors(f"its header speaks of {end} bytes, and there are {num_bytes}")


def _place(name: str, entry: Any) -> tuple[int, int, str]:
    """Where a tensor lies; that its shape fits is checked in whole numbers, which do not overflow."""
    fields = entry if isinstance(entry, dict) else {}
    shape, offsets, dtype = fields.get("shape"), fields.get("data_offsets"), fields.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BadTensors(f"{name!a}: unknown dtype {str(dtype)[:20]!a}")
    if not _is_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise BadTensors(f"{name!a}: its shape is not a list of sizes")
    if not _is_counts(offsets) or len(offsets) != 2:
        raise BadTensors(f"{name!a}: its place is not two offsets")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != needed:
        raise BadTensors(f"{name!a} of shape {shape} needs {needed} bytes and has {offsets[1] - offsets[0]}")
    return offsets[0], offsets[1], name


def _is_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _tensor(handle: BufferedReader, start: int, entry: Mapping[str, Any]) -> torch.Tensor:
    dtype = DTYPES[entry["dtype"]]
    first, last = entry["data_offsets"]
    if first == last:
        return _empty(entry["shape"], dtype)
    handle.seek(start + first)
    data = bytearray(last - first)
    if handle.readinto(data) != len(data):
        raise BadTensors("it became shorter while it was read")
    if dtype is torch.bool and data.strip(b"\0\1"):
        raise BadTensors("a truth value is neither 0 nor 1")
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(entry["shape"])


def _empty(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError as error:  # [0, 2**60, 2**60]: no element, and strides that overflow
        raise BadTensors(f"a tensor of shape {shape} cannot be") from error
