"""How much memory the copies of a bare loop may take: a share of what is free, measured, not guessed.

The optimizer's state comes with the first update, and only then can be weighed: SGD holds nothing or one buffer, Adam
two moments, an 8-bit optimizer a quarter of that. Until then the weights alone are counted; afterwards the ring gets
as many places as really fit.
"""

from __future__ import annotations

import psutil
import torch

from finitune.adapters.bare import BarePort
from finitune.adapters.bare_compute import moving_buffers
from finitune.adapters.bare_origin import Originals, untrained
from finitune.adapters.codes import NO_PLACE_FOR_STATES
from finitune.core.types import Finding
from finitune.core.units import bytes_text
from finitune.engine.snapshot import SnapshotRing, state_bytes

_ORIGINALS = 0.5
"""Of the share: copies of what is not trained may take so much of it."""


class Room:
    """The ring of snapshots of one port, and its budget."""

    def __init__(self, port: BarePort, share: float, max_count: int) -> None:
        self.port, self.share, self.max_count = port, share, max_count
        budget = self._budget(0)
        port.originals = Originals.within(_fixed(port), int(budget * _ORIGINALS))
        self._kept = port.originals.num_bytes if port.originals is not None else 0
        self._size = state_bytes(port)
        self.ring = SnapshotRing.within(budget - self._kept, self._size, max_count=max_count)

    def _budget(self, held: int) -> int:
        """Bytes; ``held``: so many are copies already, and not free for that reason only."""
        return int((psutil.virtual_memory().available + held) * self.share)

    def measured(self) -> Finding | None:
        """Fit the ring to the state as it is now, where that has grown or shrunk; before a snapshot is taken."""
        size = state_bytes(self.port)
        if size == self._size or not self.ring.num_slots:
            return None
        self._size = size
        held = self._kept + sum(s.num_bytes for s in self.ring.taken)
        fitting = int(min(self.max_count, (self._budget(held) - self._kept) // max(1, size)))
        self.ring.num_slots = max(0, fitting)
        self.ring.taken = self.ring.taken[max(0, len(self.ring.taken) - self.ring.num_slots) :]
        return self.missing()

    def missing(self) -> Finding | None:
        """Said where not even one snapshot fits."""
        if self.ring.num_slots:
            return None
        budget = bytes_text(max(0, self._budget(self._kept) - self._kept))
        return NO_PLACE_FOR_STATES.find("", needed=bytes_text(self._size), budget=budget, share=self.share)


def _fixed(port: BarePort) -> dict[str, torch.Tensor]:
    trained = {id(p) for _, p in port.parameters()} | {id(b) for _, b in moving_buffers(port.model)}
    return dict(untrained(port.model, trained))
