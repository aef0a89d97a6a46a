"""The main loop.

while steps are left and nobody asked to stop:
    turn = guard.one()           compute -> judge -> commit | abort; a failure is investigated and treated
        PROCEED              the step is in the model
        RETRY_SMALLER_SCALE  same batch again, loss scale halved
        TREAT                same batch again, the cause removed
        SKIP_BATCH           batch given up, its row ids are in the journal
        HALT                 stop; the last good state stands
    tell the observers
    evaluate, sample, save where due
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from finitune.core.errors import Halted
from finitune.core.journal import Journal
from finitune.core.types import Verdict
from finitune.engine.codes import JOURNAL_LOST, NOTHING_LEARNT, TOO_MANY_ABORTS
from finitune.engine.guard import Guard, Turn
from finitune.engine.policy import Action
from finitune.engine.step import Outcome
from finitune.train.observer import Observers, StepEvent
from finitune.train.step import TrainPort

# So many measurements in a row without any moved weight mean that nothing is being learnt.
_STILL_MEASUREMENTS = 3


@dataclass(frozen=True, slots=True)
class Due:
    """What happens every so many steps; ``run(step)`` is called after the step is journalled."""

    every_steps: int | None
    run: Callable[[int], None]

    def at(self, step: int) -> bool:
        """Due after ``step`` batches."""
        return self.every_steps is not None and step > 0 and step % self.every_steps == 0


@dataclass(slots=True)
class Loop:
    """A run in progress; built by ``train/session.py``."""

    port: TrainPort
    guard: Guard
    journal: Journal
    observers: Observers
    total_steps: int
    dues: tuple[Due, ...] = ()
    after_step: Callable[[int], None] = field(default=lambda _step: None)
    """Called with the number of batches used up, after everything that was due."""
    stop_requested: Callable[[], bool] = field(default=lambda: False)
    counts: Counter[str] = field(default_factory=Counter)
    """How often each code was found in a step."""
    step_time_s: float = 0.0
    """Seconds spent in steps, without evaluation, sampling and saving."""
    num_transactions: int = 0

    @property
    def mean_step_s(self) -> float:
        """Seconds a transaction took on the average; 0 before the first."""
        return self.step_time_s / self.num_transactions if self.num_transactions else 0.0

    def run(self) -> bool:
        """Train to the end; True if finished, False if asked to stop. Raises Halted."""
        state = self.port.state
        while state.step < self.total_steps:
            if self.stop_requested():
                return False
            before = state.step
            self.one()
            if state.step > before:
                for due in self.dues:
                    if due.at(state.step):
                        due.run(state.step)
                self.after_step(state.step)
        return True

    def one(self) -> Action:
        """One transaction and what follows from it. Raises Halted."""
        state = self.port.state
        turn = self.guard.one()
        outcome = turn.outcome
        self.step_time_s += turn.time_s
        self.num_transactions += 1
        self.counts.update(f.code for f in outcome.judgement.findings)
        self.observers.tell(
            "step",
            StepEvent(
                outcome.reading,
                outcome.judgement,
                turn.action,
                outcome.rows,
                self.total_steps,
                state.updates,
                turn.time_s,
            ),
        )
        if turn.incident is not None:
            self.observers.tell("incident", turn.incident, str(self.journal.path.parent))
        self._halt_where_due(turn)
        self._halt_if_still(outcome)
        return turn.action

    def _halt_where_due(self, turn: Turn) -> None:
        """Raise what the guard wants raised."""
        if turn.halt is not None:
            raise turn.halt
        if turn.action is Action.HALT:
            raise self._too_many(turn.outcome)

    def _too_many(self, outcome: Outcome) -> Halted:
        state = self.port.state
        reasons = [f.code for f in outcome.judgement.findings if f.veto]
        return Halted(
            TOO_MANY_ABORTS,
            str(self.journal.path.parent),
            count=state.history.aborts_in_a_row,
            step=outcome.reading.step,
            reason=reasons[0] if reasons else "unknown",
            updates=state.updates,
            journal=str(self.journal.path),
            half_lr=self.port.parts.optim_settings.lr / 2,
            limit=self.guard.policy.max_aborts_in_a_row,
        )

    def _halt_if_still(self, outcome: Outcome) -> None:
        """Stop when no weight has moved in the last measurements although the rate is not zero."""
        recent = list(self.port.state.history.changed_fraction)[-_STILL_MEASUREMENTS:]
        measured = outcome.reading.changed_fraction is not None and outcome.judgement.verdict is Verdict.COMMIT
        if not measured or len(recent) < _STILL_MEASUREMENTS or any(not math.isclose(c, 0.0) for c in recent):
            return
        raise Halted(
            NOTHING_LEARNT, count=len(recent), step=outcome.reading.step, changed=recent[-1], lr=outcome.reading.lr
        )


def record_or_halt(journal: Journal, kind: str, **record: object) -> None:
    """Journal a record. Raises Halted where the disk refuses: nothing may happen unrecorded."""
    try:
        journal.write(kind, **record)
    except OSError as error:
        run = str(journal.path.parent)
        raise Halted(JOURNAL_LOST, path=str(journal.path), error=str(error), run=run) from error
