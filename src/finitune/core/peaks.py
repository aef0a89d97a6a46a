"""The long memory of a window: how far above their median values have been, in blocks."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any


class Peaks:
    """How far values have been above the median of their time, and the medians: the highest of each block of 64.

    For the last 4096 values. A kind of row that comes once in 500 steps is in no window of 128, but it is here.
    """

    BLOCK, COUNT = 64, 64

    def __init__(self) -> None:
        self._blocks: deque[float] = deque(maxlen=self.COUNT)
        self._levels: deque[float] = deque(maxlen=self.COUNT)
        self._in_block = 0

    @property
    def num_seen(self) -> int:
        """Values that are remembered."""
        return self.BLOCK * (len(self._blocks) - (self._in_block > 0)) + self._in_block

    def add(self, value: float, median: float) -> None:
        """Take a finite value and the median before it."""
        excess = value - median
        if self._in_block:
            self._blocks[-1], self._levels[-1] = max(self._blocks[-1], excess), max(self._levels[-1], median)
        else:
            self._blocks.append(excess)
            self._levels.append(median)
        self._in_block = (self._in_block + 1) % self.BLOCK

    def highest(self) -> float:
        """The greatest distance of all; -inf when empty."""
        return max(self._blocks, default=-math.inf)

    def level(self) -> float:
        """The greatest median of all; -inf when empty."""
        return max(self._levels, default=-math.inf)

    def state(self) -> dict[str, Any]:
        """JSON-able state; floats survive exactly."""
        return {"blocks": list(self._blocks), "levels": list(self._levels), "in_block": self._in_block}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` gave."""
        self._blocks = deque((float(v) for v in state["blocks"]), maxlen=self.COUNT)
        self._levels = deque((float(v) for v in state["levels"]), maxlen=self.COUNT)
        self._in_block = int(state["in_block"])
