"""Windows that refuse non-finite values, and the history that detectors judge by.

A statistic that has swallowed one NaN is blind for ever (PaLM-style EMAs, z-score clippers and
rolling means all fail so); here a non-finite value is counted and turned away at the door.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

# Scale that makes the median absolute deviation estimate the standard deviation of a normal
# sample: 1 / Phi^-1(3/4) (Rousseeuw & Croux 1993).
MAD_TO_SIGMA = 1.4826022185056018


class Window:
    """The last ``size`` finite values, with robust location and spread."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"window size {size} < 1")
        self._values: deque[float] = deque(maxlen=size)
        self.num_refused = 0

    def add(self, value: float) -> bool:
        """Take a finite value; refuse and count any other. True if taken."""
        if not math.isfinite(value):
            self.num_refused += 1
            return False
        self._values.append(float(value))
        return True

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[float]:
        return iter(self._values)

    def median(self) -> float:
        """Median; NaN when empty."""
        return median(self._values) if self._values else math.nan

    def sigma(self) -> float:
        """Robust standard deviation (scaled MAD); NaN when empty."""
        if not self._values:
            return math.nan
        centre = self.median()
        return MAD_TO_SIGMA * median(abs(v - centre) for v in self._values)

    def state(self) -> dict[str, Any]:
        """JSON-able state; floats survive exactly."""
        return {"size": self._values.maxlen, "values": list(self._values), "num_refused": self.num_refused}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` gave."""
        self._values = deque((float(v) for v in state["values"]), maxlen=int(state["size"]))
        self.num_refused = int(state["num_refused"])


class History:
    """What detectors may know of the past: windows over *committed* steps, and counters.

    ``log_loss`` and ``log_grad_norm`` hold natural logarithms of positive values, because losses
    and gradient norms vary by factors, not by sums. Counters move on aborts too; the windows do not.
    """

    SIZE = 128

    def __init__(self, size: int = SIZE) -> None:
        self.log_loss = Window(size)
        self.log_grad_norm = Window(size)
        self.changed_fraction = Window(8)
        self.num_committed = 0
        self.num_aborted = 0
        self.aborts_in_a_row = 0
        self.overflows_in_a_row = 0
        self.num_overflows = 0
        self.first_loss = math.nan
        self.first_headroom_bits = math.nan

    def committed(
        self,
        loss: float,
        grad_norm: float,
        *,
        changed_fraction: float | None = None,
        headroom_bits: float | None = None,
    ) -> None:
        """Take a committed step into the statistics."""
        if loss > 0:
            self.log_loss.add(math.log(loss))
        if grad_norm > 0:
            self.log_grad_norm.add(math.log(grad_norm))
        if changed_fraction is not None:
            self.changed_fraction.add(changed_fraction)
        if math.isnan(self.first_loss) and math.isfinite(loss):
            self.first_loss = loss
        if headroom_bits is not None and math.isnan(self.first_headroom_bits) and math.isfinite(headroom_bits):
            self.first_headroom_bits = headroom_bits
        self.num_committed += 1
        self.aborts_in_a_row = self.overflows_in_a_row = 0

    def aborted(self) -> None:
        """Count a batch that was given up; statistics stay as they are."""
        self.num_aborted += 1
        self.aborts_in_a_row += 1

    def overflowed(self) -> None:
        """Count an overflow that the loss scaler answered with a smaller scale."""
        self.num_overflows += 1
        self.overflows_in_a_row += 1

    _WINDOWS = ("log_loss", "log_grad_norm", "changed_fraction")
    _COUNTERS = ("num_committed", "num_aborted", "aborts_in_a_row", "overflows_in_a_row", "num_overflows")
    _FIRSTS = ("first_loss", "first_headroom_bits")

    def state(self) -> dict[str, Any]:
        """JSON-able state (NaN of an unset first value is None)."""
        out: dict[str, Any] = {w: getattr(self, w).state() for w in self._WINDOWS}
        out.update({c: getattr(self, c) for c in self._COUNTERS})
        out.update({f: None if math.isnan(getattr(self, f)) else getattr(self, f) for f in self._FIRSTS})
        return out

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` gave."""
        for name in self._WINDOWS:
            getattr(self, name).load(state[name])
        for name in self._COUNTERS:
            setattr(self, name, int(state[name]))
        for name in self._FIRSTS:
            setattr(self, name, math.nan if state[name] is None else float(state[name]))
