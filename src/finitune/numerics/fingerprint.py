"""Fingerprints of a training state: one digest, and a checksum of every tensor so that a difference has a name.

CRC-32 runs at several GB/s and finds every single flipped bit for certain and any other change but one in 2**32
(ISO 3309 polynomial, ``zlib.crc32``); it guards against races and hardware, not against forgery. Bits are compared,
not values: -0.0 differs from 0.0 and one NaN pattern from another.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from finitune.core.journal import encode

RECORD = "(record)"
"""Stands for the part of a state that is not tensors."""
UNKNOWN = "(digest)"
"""The digests differ, and no part of the state can be named."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What the bits of a state come to."""

    digest: str
    """BLAKE2b, 128 bits in hexadecimal, over all of the below."""
    names: tuple[str, ...]
    sums: tuple[int, ...]
    """CRC-32 of each tensor: dtype, shape and bits."""
    record_sum: int
    """CRC-32 of the record."""

    def to_json(self) -> dict[str, Any]:
        """A short record; the names are not in it (they follow from the model and its optimizer)."""
        packed = struct.pack(f"<{len(self.sums)}I", *self.sums)
        return {"digest": self.digest, "tensors": base64.b64encode(packed).decode(), "record": self.record_sum}


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's dtype, shape and bits, on any device."""
    head = zlib.crc32(f"{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    if not tensor.numel():
        return head
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data, head)


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]], record: Mapping[str, Any]) -> Fingerprint:
    """The fingerprint of named tensors and a JSON-able record."""
    names, sums = [], []
    for name, tensor in tensors:
        names.append(name)
        sums.append(checksum(tensor))
    text = json.dumps(encode(record), sort_keys=True).encode()
    whole = hashlib.blake2b("\n".join(names).encode(), digest_size=16)
    whole.update(struct.pack(f"<{len(sums)}I", *sums))
    whole.update(text)
    return Fingerprint(whole.hexdigest(), tuple(names), tuple(sums), zlib.crc32(text))


def first_difference(expected: Any, actual: Fingerprint) -> str | None:
    """The first tensor in which ``actual`` differs from a journalled fingerprint; None where nothing does.

    :data:`RECORD` where all tensors agree and the record does not; "(number of tensors)" where they cannot be
    compared one by one; :data:`UNKNOWN` where all parts agree, or where it is no record of
    :meth:`Fingerprint.to_json`.
    """
    if not isinstance(expected, Mapping):
        return UNKNOWN
    if expected.get("digest") == actual.digest:
        return None
    try:
        packed = base64.b64decode(str(expected["tensors"]), validate=True)
        sums = struct.unpack(f"<{len(packed) // 4}I", packed)
    except (KeyError, ValueError, binascii.Error, struct.error):
        return UNKNOWN
    if len(sums) != len(actual.sums):
        return "(number of tensors)"
    differing = (n for n, was, now in zip(actual.names, sums, actual.sums, strict=True) if was != now)
    return next(differing, UNKNOWN if expected.get("record") == actual.record_sum else RECORD)
