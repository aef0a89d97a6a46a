"""Copies of what nothing trains, as it was when the guard came: the source to repair a frozen weight or buffer from.

They lie on the host and have a checksum each, so that a copy that was itself changed is not taken.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from finitune.engine.snapshot import is_out_of_memory
from finitune.numerics.fingerprint import checksum


def untrained(model: nn.Module, state: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Weights and buffers whose id is not in ``state``."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return ((name, tensor) for name, tensor in named.items() if id(tensor) not in state)


class Originals:
    """Copies by name."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._copies = {n: t.detach().to("cpu", copy=True) for n, t in tensors.items()}
        self._sums = {n: checksum(t) for n, t in self._copies.items()}

    @classmethod
    def within(cls, tensors: dict[str, Tensor], budget_bytes: int) -> Originals | None:
        """None where they do not fit, or where there are none."""
        size = sum(t.nbytes for t in tensors.values())
        if not tensors or size > budget_bytes:
            return None
        try:
            return cls(tensors)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                return None
            raise

    @property
    def num_bytes(self) -> int:
        """Memory that the copies take."""
        return sum(t.nbytes for t in self._copies.values())

    def get(self, name: str) -> torch.Tensor | None:
        """The copy, where it is still what was copied."""
        copied = self._copies.get(name)
        return copied if copied is not None and checksum(copied) == self._sums[name] else None
