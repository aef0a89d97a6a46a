"""Is the loss still computed as it was? A step of the past, once more, against what the journal says of it.

Where loss and gradient norm leap together by one factor, either the data changed or the formula did. The two cannot be
told apart from their numbers, but by one computation: the state of before and its batch give the recorded loss bit for
bit, unless the loss function is another one now. A factor that is the number of micro-batches (a sum for a mean, or
the other way round) tells what changed.

The suspicion is cheap and need not be strict: it costs one replay, and nothing is said unless that confirms it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from finitune.core.robust import History
from finitune.engine.conditions import NotPossible
from finitune.engine.monitor import read
from finitune.engine.policy import Action
from finitune.engine.port import ReplayPort
from finitune.engine.snapshot import Snapshot

LEAP_STEPS = 3
"""Steps on the new level. One or two may be hard batches."""
BEFORE_STEPS, FEWEST_BEFORE = 12, 8
"""Steps of before, none of which was on that level."""
LEAST_FACTOR = 1.4
"""The smallest factor of an accumulation is 2; noise takes something away."""
LEAP_SHARE = 0.5
"""Of the whole rise, what the first of these steps made: a formula changes between two steps."""
ALIKE = 2.0
"""The rise of the gradient norm (in logarithms) over that of the loss, and its inverse, at most."""
SAME = 0.01
"""Two losses so near each other are the same: kernels that do not repeat differ by less, a factor by far more."""
FITS = 0.02
"""A factor so near the number of micro-batches is that number."""


def leapt(history: History) -> bool:
    """Loss and gradient norm have just come to another level, both by about one factor; of committed steps."""
    needed = LEAP_STEPS + FEWEST_BEFORE
    if len(history.log_loss) < needed or len(history.log_grad_norm) < needed:
        return False
    losses = history.log_loss.tail(LEAP_STEPS + BEFORE_STEPS)
    before, new = losses[:-LEAP_STEPS], losses[-LEAP_STEPS:]
    rise = median(new) - median(before)
    away = min(new) > max(before) if rise > 0 else max(new) < min(before)
    if not (abs(rise) >= math.log(LEAST_FACTOR) and away):
        return False
    norms = history.log_grad_norm.tail(LEAP_STEPS + BEFORE_STEPS)
    alike = (median(norms[-LEAP_STEPS:]) - median(norms[:-LEAP_STEPS])) / rise
    return (new[0] - before[-1]) / rise >= LEAP_SHARE and 1 / ALIKE <= alike <= ALIKE


@dataclass(frozen=True, slots=True)
class Past:
    """A step whose state of before is kept, as the journal tells it."""

    base: int
    """Batches used up in the kept state; the step is the next one."""
    loss: float
    grad_norm: float

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]], bases: Iterable[int]) -> list[Past]:
        """Those of these states whose next step was committed, newest first."""
        made = {
            int(r["step"]): r for r in records if r.get("kind") == "step" and r.get("action") == Action.PROCEED.value
        }
        known = [(b, made[b + 1]) for b in sorted(set(bases), reverse=True) if b + 1 in made]
        pairs: list[tuple[int, Any, Any]] = [(b, r.get("loss"), r.get("grad_norm")) for b, r in known]
        return [cls(b, float(x), float(g)) for b, x, g in pairs if _numbers(x, g)]

    def to_json(self) -> dict[str, float]:
        """JSON-able."""
        return {"base": self.base, "loss": self.loss, "grad_norm": self.grad_norm}


def _numbers(*values: Any) -> bool:
    return all(isinstance(v, float | int) and math.isfinite(v) and v > 0 for v in values)


@dataclass(frozen=True, slots=True)
class Again:
    """A step of the past, computed again."""

    past: Past
    loss: float
    grad_norm: float
    micros: int
    """Micro-batches of the step."""

    @property
    def factor(self) -> float:
        """The loss of now over that of then."""
        return self.loss / self.past.loss

    @property
    def same(self) -> bool:
        """It came out as the journal says. NaN counts as another loss."""
        return abs(self.factor - 1.0) <= SAME

    @property
    def by_micros(self) -> bool:
        """Loss and gradient are larger, or smaller, by the number of micro-batches."""
        if self.micros < 2 or not _numbers(self.loss, self.grad_norm):
            return False
        wanted, found = math.log(self.micros), (math.log(self.factor), math.log(self.grad_norm / self.past.grad_norm))
        return any(all(abs(sign * x - wanted) <= FITS for x in found) for sign in (1, -1))

    def numbers(self) -> dict[str, Any]:
        """For a finding or an evidence."""
        ratio = self.grad_norm / self.past.grad_norm
        told = {"past_step": self.past.base + 1, "was": self.past.loss, "now": self.loss}
        return {**told, "factor": self.factor, "grad_factor": ratio, "micros": self.micros}


def once_more(port: ReplayPort, past: Past) -> Again:
    """Compute the step after a kept state, on which the port stands. Raises NotPossible."""
    try:
        reading = read(port.forward_backward())
        micros = len(port.batch())
    finally:
        port.abort()
    return Again(past, reading.loss, reading.grad_norm, micros)


def before_the_leap(known: Sequence[Past], step: int) -> Past | None:
    """The newest of these that was made before the leap of which ``step`` is the newest step."""
    return next((p for p in known if p.base + 1 <= step - LEAP_STEPS), None)


def stand_at(port: ReplayPort, snapshot: Snapshot) -> None:
    """Make a kept state the port's. Raises NotPossible where its bits are not those that were kept."""
    if not snapshot.intact():
        raise NotPossible("the kept state was changed in memory")
    snapshot.restore(port)
