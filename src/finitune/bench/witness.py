"""What a contender did with a workload, told by itself and looked at from outside.

The contender tells what it found and whether a batch was committed; the witness looks at every state tensor after
every batch, keeps copies as a script keeps checkpoints, and lets the fault act between the steps.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from finitune.bench.workload import Workload
from finitune.numerics.statecheck import bad_tensors

CHECKPOINT_STEPS = 10


@dataclass(frozen=True, slots=True)
class Said:
    """Something that the contender found."""

    step: int
    """From 1."""
    code: str
    """Its stable code; "" where it has none."""
    where: tuple[tuple[str, str], ...] = ()
    """(kind, name) of what it points at."""
    text: str = ""


@dataclass(slots=True)
class Witness:
    """Stands beside one run of one contender."""

    load: Workload
    said: list[Said] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)
    """By step, of committed batches."""
    refused: list[int] = field(default_factory=list)
    """Steps whose batch was not committed."""
    poisoned: list[int] = field(default_factory=list)
    """Steps that were committed and left a non-finite weight, buffer or moment."""
    poisoned_weights: list[int] = field(default_factory=list)
    """Those of them that left a non-finite weight or buffer."""
    num_checkpoints: int = 0
    poisoned_checkpoints: list[int] = field(default_factory=list)
    error: str = ""
    """Type and first line of what it raised; the run ended there."""
    error_step: int = 0
    incidents: list[dict[str, Any]] = field(default_factory=list)
    """Of contenders that have them: step, code, known, suspects, remedy, outcome, replays, tried."""
    time_s: float = 0.0
    _started_s: float = field(default_factory=time.perf_counter)

    def begin(self) -> None:
        """The next batch is handed over."""
        self.load.step += 1
        self._started_s = time.perf_counter()

    def find(self, code: str, where: tuple[tuple[str, str], ...] = (), text: str = "", step: int = 0) -> None:
        """The contender found something at the step at hand."""
        self.said.append(Said(step or self.load.step, code, where, text))

    def stepped(self, *, committed: bool, loss: float) -> None:
        """A batch is used up."""
        self.time_s += time.perf_counter() - self._started_s
        step = self.load.step
        if committed:
            self.losses[step] = loss
        else:
            self.refused.append(step)
        self._look(step, committed=committed)
        for act in self.load.after.pop(step, ()):
            act()

    def _look(self, step: int, *, committed: bool) -> None:
        bad = self._bad()
        if committed:
            self._note(step, bad)
        if step % CHECKPOINT_STEPS == 0:
            self.num_checkpoints += 1
            if bad:
                self.poisoned_checkpoints.append(step)

    def raised(self, error: BaseException) -> None:
        """The run ended with an error."""
        self.time_s += time.perf_counter() - self._started_s
        self.error = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        self.error_step = self.load.step
        if self.load.step in self.losses:
            self._note(self.load.step, self._bad())

    def _bad(self) -> list[str]:
        return [name for name in bad_tensors(self.load.state_tensors()) if name not in self.load.spoilt]

    def _note(self, step: int, bad: list[str]) -> None:
        if bad:
            self.poisoned.append(step)
        if any("|" not in name for name in bad):  # PARAMETER|SLOT is a moment
            self.poisoned_weights.append(step)
