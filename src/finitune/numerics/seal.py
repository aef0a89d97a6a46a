"""Seals: sums over the bits of tensors that are made at the speed of memory, to see later whether they still are so.

A fingerprint (``numerics/fingerprint.py``) can be written down and compared with another machine's; its CRC-32 costs
about three times the copying of a state, a seal half of it. A seal lives only as long as the tensors in memory. It
holds the sum of the 64-bit words of every block, modulo 2**64: any change within one word is found for certain,
wherever it is; changes of several words of a block would have to cancel out to the bit.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finitune.core.journal import encode

_WORD_BYTES = 8
_BLOCK_WORDS = 4096


@dataclass(frozen=True, slots=True)
class Seal:
    """What the bits of a state summed up to."""

    parts: tuple[tuple[str, str, Tensor], ...]
    """Name, form and block sums (B,) int64 of each tensor."""
    record_sum: int
    """CRC-32 of the record."""

    def holds(self, tensors: Iterable[tuple[str, Tensor]], record: Mapping[str, Any]) -> bool:
        """Whether tensors and record are bit for bit those that were sealed."""
        now = seal(tensors, record)
        if now.record_sum != self.record_sum or len(now.parts) != len(self.parts):
            return False
        pairs = zip(now.parts, self.parts, strict=True)
        return all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in pairs)


def seal(tensors: Iterable[tuple[str, Tensor]], record: Mapping[str, Any]) -> Seal:
    """Seal named tensors and a JSON-able record."""
    parts = tuple((name, f"{t.dtype}|{tuple(t.shape)}", block_sums(t)) for name, t in tensors)
    return Seal(parts, zlib.crc32(json.dumps(encode(record), sort_keys=True).encode()))


def block_sums(tensor: Tensor) -> Tensor:
    """Sums of the 64-bit words of each 32 KiB of a tensor's bits, modulo 2**64, (B,) int64 on the host.

    The last one is the rest of less than a word itself.
    """
    if not tensor.numel():
        return torch.zeros(0, dtype=torch.int64)
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.storage_offset() * flat.element_size() % _WORD_BYTES:
        flat = flat.clone()
    bytes_N = flat.view(torch.uint8)
    num_whole = bytes_N.numel() // _WORD_BYTES * _WORD_BYTES
    words_W = bytes_N[:num_whole].view(torch.int64)
    num_blocked = words_W.numel() // _BLOCK_WORDS * _BLOCK_WORDS
    rest = int.from_bytes(bytes(bytes_N[num_whole:].tolist()), "little")
    sums = [
        words_W[:num_blocked].view(-1, _BLOCK_WORDS).sum(dim=1),
        words_W[num_blocked:].sum().reshape(1),
        torch.tensor([rest], device=flat.device),
    ]
    return torch.cat(sums).cpu()
