"""Windows that refuse non-finite values, and the history that detectors judge by.

A statistic that has swallowed one NaN is blind for ever (PaLM-style EMAs, z-score clippers and
rolling means all fail so); here a non-finite value is counted and turned away at the door.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from finitune.core.peaks import Peaks
from finitune.core.types import Reading

# Scale that makes the median absolute deviation estimate the standard deviation of a normal
# sample: 1 / Phi^-1(3/4) (Rousseeuw & Croux 1993).
MAD_TO_SIGMA = 1.4826022185056018

# A tail is laid through the highest eighth of the window, of 4 values at least.
_TAIL_SHARE, _TAIL_LEAST = 8, 4
# How sure of its scale one is before anything was seen: as if so many values had been looked at.
_PRIOR_WEIGHT = 8
# Scale of the logarithms of a power law with exponent 2: the lightest tail without a variance.
_HEAVIEST = 0.5
# Fewer values than these have no median that a peak could be measured from; a poison among them is soon forgotten.
_SETTLED = 20
# Where a step goes so many times beyond the newest values, these are not asked how far a step may go: the first steps
# of a climb would excuse the next ones (norms 0.2, 0.9, 2.4, 16, 145, 960 in the 176B run of BigScience).
_CLIMB, _CLIMB_FACTOR = 8, 3.0
# Above the record by less is no new one: noise makes such steps all the time.
_RECORD_FACTOR = 1.2
# Where a tenth of the losses is negative (policy gradients), logarithms of the rest say nothing of their size.
_SIGNED_SHARE = 10


class Window:
    """The last ``size`` finite values, with robust location and spread."""

    def __init__(self, size: int, *, peaks: bool = False) -> None:
        """``peaks``: also remember for long how far above the median values have been."""
        if size < 1:
            raise ValueError(f"window size {size} < 1")
        self.peaks = Peaks() if peaks else None
        self._values: deque[float] = deque(maxlen=size)
        self._ordered: list[float] = []
        self._sigma: float | None = None
        self.num_refused = 0

    def add(self, value: float) -> bool:
        """Take a finite value; refuse and count any other. True if taken."""
        if not math.isfinite(value):
            self.num_refused += 1
            return False
        if self.peaks is not None and len(self._values) >= _SETTLED + _CLIMB:
            self.peaks.add(self._values[-_CLIMB], self.median())
        if len(self._values) == self._values.maxlen:
            del self._ordered[bisect_left(self._ordered, self._values[0])]
        self._values.append(float(value))
        insort(self._ordered, float(value))
        self._sigma = None
        return True

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[float]:
        return iter(self._values)

    def tail(self, count: int) -> list[float]:
        """The newest ``count`` values, oldest first; fewer where the window holds fewer."""
        values = self._values
        return [values[i] for i in range(-min(count, len(values)), 0)]

    def median(self) -> float:
        """Median; NaN when empty."""
        return _median(self._ordered)

    def sigma(self) -> float:
        """Robust standard deviation (scaled MAD); NaN when empty. Computed once a step: several detectors ask."""
        if self._sigma is None:
            centre = self.median()
            # Ordered values give a falling and a rising run of distances, which ``sorted`` merges in one pass.
            self._sigma = MAD_TO_SIGMA * _median(sorted([abs(v - centre) for v in self._ordered]))
        return self._sigma

    def record(self) -> float:
        """The highest value of the window, or what the highest peak of the past would be now; -inf when empty."""
        return self._record(self._ordered)

    def _record(self, ordered: list[float]) -> float:
        highest = ordered[-1] if ordered else -math.inf
        return highest if self.peaks is None else max(highest, self.median() + self.peaks.highest())

    def level(self) -> float:
        """The highest that the median has been for long: what a run that forgets goes back to; NaN when empty."""
        return self.median() if self.peaks is None else max(self.median(), self.peaks.level())

    def climbs_to(self, value: float) -> bool:
        """Whether a value is far beyond the newest ones as well: the next step of a climb, no new level."""
        newest = self.tail(_CLIMB)
        return len(self._values) >= _SETTLED + _CLIMB and value > max(newest) + math.log(_CLIMB_FACTOR)

    def tail_limit(
        self, chance: float, prior_scale: float, *, without_newest: bool = False, own_tail: bool = False
    ) -> float:
        """The value that a step of this run exceeds with about the probability ``chance``; NaN when empty.

        Above the highest eighth the tail is taken to fall off exponentially: for logarithms a power law, which is
        heavier than the tails of normal and log-normal noise. Its scale is learnt from these values, upwards by two
        standard errors, ``prior_scale`` counting as if it had been seen in 8; but rare rows inflate it, so it leads
        no further than a tail without a variance would from the record on (with ``own_tail``: than one of the learnt
        scale, where that is heavier). Nor is it nearer to the record than the typical tail allows for what was not
        seen in so many steps. ``without_newest`` leaves out the newest 8.

        Source: Hill 1975, "A simple general approach to inference about the tail of a distribution"; the
        conjugate prior of an exponential scale.
        """
        ordered = sorted(list(self._values)[:-_CLIMB]) if without_newest else self._ordered
        count = len(ordered)
        if count < 2:
            return math.nan
        num = min(max(_TAIL_LEAST, count // _TAIL_SHARE), count - 1)
        start = ordered[-num - 1]
        excess = [v - start for v in ordered[count - num :]]
        weight, known = num + _PRIOR_WEIGHT, _PRIOR_WEIGHT * prior_scale
        scale = (sum(excess) + known) / weight * (1.0 + 2.0 / math.sqrt(weight))
        typical = (_median(excess) / math.log(2.0) * num + known) / weight
        unseen = math.log(max(1.0, 1.0 / (self.num_seen * chance)))
        reach = start + scale * math.log(max(1.0, num / (count * chance)))
        record, heaviest = self._record(ordered), max(scale, _HEAVIEST) if own_tail else _HEAVIEST
        most, least = record + heaviest * unseen, record + min(max(typical, prior_scale), heaviest) * unseen
        return max(min(reach, most), least)

    @property
    def num_seen(self) -> int:
        """Values that :meth:`record` is the highest of."""
        return max(len(self._values), 0 if self.peaks is None else self.peaks.num_seen)

    def state(self) -> dict[str, Any]:
        """JSON-able state; floats survive exactly."""
        out = {"size": self._values.maxlen, "values": list(self._values), "num_refused": self.num_refused}
        return out if self.peaks is None else {**out, "peaks": self.peaks.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` gave."""
        self._values = deque((float(v) for v in state["values"]), maxlen=int(state["size"]))
        self._ordered = sorted(self._values)
        self._sigma = None
        self.num_refused = int(state["num_refused"])
        if self.peaks is not None:
            self.peaks = Peaks()
            self.peaks.load(state.get("peaks", self.peaks.state()))


def _median(ordered: list[float]) -> float:
    """Median of sorted values; NaN of none."""
    if not ordered:
        return math.nan
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


@dataclass(frozen=True, slots=True)
class Bounds:
    """What makes a value an outlier."""

    factor: float
    """At least this many times the median, and the highest median of the last 4096 steps."""
    chance: float
    """Probability of such a value in a step, by the tail of the run, below which it is one."""
    prior_scale: float
    """Scale of the tail of the logarithms before anything was seen."""
    own_tail: bool = False
    """A tail as heavy as the run has shown is believed in, however heavy."""


@dataclass(frozen=True, slots=True)
class Outlier:
    """How far out a value is."""

    median: float
    limit: float
    times: float
    """value / median"""


def outlier(log_window: Window, value: float, bounds: Bounds) -> Outlier | None:
    """Judge ``value`` by the logarithms of the past; None for no outlier, or what is not positive or not finite."""
    if not (math.isfinite(value) and value > 0) or len(log_window) < 2:
        return None
    centre = log_window.median()
    least = log_window.level() + math.log(bounds.factor)
    if math.log(value) <= least:
        return None
    climbs = log_window.climbs_to(math.log(value))
    past = {"without_newest": climbs, "own_tail": bounds.own_tail}
    limit = max(least, log_window.tail_limit(bounds.chance, bounds.prior_scale, **past))
    if math.log(value) <= limit:
        return None
    return Outlier(bounded_exp(centre), bounded_exp(limit), bounded_exp(math.log(value) - centre))


def breaks_record(log_window: Window, value: float, factor: float, rise: float = 0.0) -> bool:
    """``value`` is ``factor`` times the median, ``rise`` above it, and clearly above everything seen for long."""
    if not (math.isfinite(value) and value > 0) or not len(log_window):
        return False
    if value - bounded_exp(log_window.median()) < rise:
        return False
    least = max(log_window.level() + math.log(factor), log_window.record() + math.log(_RECORD_FACTOR))
    return math.log(value) > least


def bounded_exp(value: float) -> float:
    """e^value; inf where a double cannot hold it."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


class History:
    """What detectors may know of the past: windows over *committed* steps, and counters.

    ``log_loss``, ``log_grad_norm`` and ``log_lr`` hold natural logarithms of positive values, because losses
    and gradient norms vary by factors, not by sums; ``log2_scale`` holds binary ones. Counters move on
    aborts too; the windows do not, but for ``overflows``: 1 for every try that overflowed under a loss
    scale, 0 for every committed step. ``headroom_at`` holds ``num_committed`` of each value of
    ``headroom_bits``, which is not measured at every step; ``log_update_per_lr`` the measured update ratios over
    the learning rate of their step.
    """

    SIZE = 128

    def __init__(self, size: int = SIZE) -> None:
        self.log_loss = Window(size, peaks=True)
        self.log_grad_norm = Window(size, peaks=True)
        self.changed_fraction = Window(8)
        self.headroom_bits = Window(40)
        self.headroom_at = Window(40)
        self.update_ratio = Window(32)
        self.log_update_per_lr = Window(8)
        self.log_lr = Window(size)
        self.log2_scale = Window(64)
        self.overflows = Window(20)
        self.num_committed = 0
        self.num_aborted = 0
        self.aborts_in_a_row = 0
        self.overflows_in_a_row = 0
        self.num_overflows = 0
        self.num_headrooms = 0
        self.zero_gradients_in_a_row = 0
        self.num_not_positive = 0
        """Committed steps with a finite loss of 0 or below."""
        self.num_negative = 0
        """Those of them with a loss below 0."""
        self.first_loss = math.nan
        self.first_headroom_bits = math.nan
        self.lowest_headroom_bits = math.nan

    def commit(self, reading: Reading) -> None:
        """Take a committed step into the statistics, with everything that was measured."""
        self.committed(
            reading.loss,
            reading.grad_norm,
            changed_fraction=reading.changed_fraction,
            headroom_bits=reading.headroom_bits,
            update_ratio=reading.update_ratio,
            loss_scale=reading.loss_scale,
            lr=reading.lr,
        )

    def committed(
        self,
        loss: float,
        grad_norm: float,
        *,
        changed_fraction: float | None = None,
        headroom_bits: float | None = None,
        update_ratio: float | None = None,
        loss_scale: float | None = None,
        lr: float | None = None,
    ) -> None:
        """The same from single numbers; None: not measured."""
        if loss > 0:
            self.log_loss.add(math.log(loss))
        elif math.isfinite(loss):
            self.num_not_positive += 1
            self.num_negative += loss < 0
        if grad_norm > 0:
            self.log_grad_norm.add(math.log(grad_norm))
        self.zero_gradients_in_a_row = self.zero_gradients_in_a_row + 1 if grad_norm == 0 else 0
        if changed_fraction is not None:
            self.changed_fraction.add(changed_fraction)
        if math.isnan(self.first_loss) and math.isfinite(loss):
            self.first_loss = loss
        if headroom_bits is not None:
            self._take_headroom(headroom_bits)
        if update_ratio is not None:
            self._take_update_ratio(update_ratio)
        if loss_scale is not None and loss_scale > 0:
            self.log2_scale.add(math.log2(loss_scale))
        if lr is not None and lr > 0:
            self.log_lr.add(math.log(lr))
        self.overflows.add(0.0)
        self.num_committed += 1
        self.aborts_in_a_row = self.overflows_in_a_row = 0

    @property
    def is_signed(self) -> bool:
        """Whether the losses are of either sign, as those of policy gradients: no factor between two means anything.

        A loss of 0 has no sign: groups whose rewards are all alike have it, and so have losses that a script replaced.
        """
        num_positive = self.num_committed - self.num_not_positive
        return _SIGNED_SHARE * self.num_negative > num_positive + self.num_negative

    def _take_headroom(self, bits: float) -> None:
        if not self.headroom_bits.add(bits):
            return
        self.headroom_at.add(float(self.num_committed))
        self.num_headrooms += 1
        if math.isnan(self.first_headroom_bits):
            self.first_headroom_bits = bits
        self.lowest_headroom_bits = min(bits, self.lowest_headroom_bits)  # NaN: bits, as the first of the two

    def _take_update_ratio(self, ratio: float) -> None:
        self.update_ratio.add(ratio)
        before = self.log_lr.tail(1)
        if ratio > 0 and before:
            self.log_update_per_lr.add(math.log(ratio) - before[0])

    def aborted(self) -> None:
        """Count a batch that was given up; statistics stay as they are."""
        self.num_aborted += 1
        self.aborts_in_a_row += 1

    def overflowed(self) -> None:
        """Count an overflow that the loss scaler answered with a smaller scale."""
        self.num_overflows += 1
        self.overflows_in_a_row += 1
        self.overflows.add(1.0)

    _WINDOWS = ("log_loss", "log_grad_norm", "changed_fraction")
    _LATER_WINDOWS = (
        "headroom_bits",
        "headroom_at",
        "update_ratio",
        "log_update_per_lr",
        "log_lr",
        "log2_scale",
        "overflows",
    )
    """Not in the records of older versions."""
    _COUNTERS = ("num_committed", "num_aborted", "aborts_in_a_row", "overflows_in_a_row", "num_overflows")
    _LATER_COUNTERS = ("num_headrooms", "zero_gradients_in_a_row", "num_not_positive", "num_negative")
    _FIRSTS = ("first_loss", "first_headroom_bits", "lowest_headroom_bits")

    def state(self) -> dict[str, Any]:
        """JSON-able state (NaN of an unset first value is None)."""
        out: dict[str, Any] = {w: getattr(self, w).state() for w in self._WINDOWS + self._LATER_WINDOWS}
        out.update({c: getattr(self, c) for c in self._COUNTERS + self._LATER_COUNTERS})
        out.update({f: None if math.isnan(getattr(self, f)) else getattr(self, f) for f in self._FIRSTS})
        return out

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` gave; what the record of an older version lacks begins empty."""
        fresh = History().state()
        # Before negative losses had a counter of their own, losses of 0 and below were taken for signed.
        state = {"num_negative": state.get("num_not_positive", 0), **state}
        for name in self._WINDOWS:
            getattr(self, name).load(state[name])
        for name in self._LATER_WINDOWS:
            getattr(self, name).load(state.get(name, fresh[name]))
        for name in self._COUNTERS:
            setattr(self, name, int(state[name]))
        for name in self._LATER_COUNTERS:
            setattr(self, name, int(state.get(name, 0)))
        for name in self._FIRSTS:
            setattr(self, name, math.nan if state.get(name) is None else float(state[name]))
