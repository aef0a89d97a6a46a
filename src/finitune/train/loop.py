"""The main loop.

while steps are left and nobody asked to stop:
    outcome = transact(port, judge, history)      compute -> judge -> commit | abort
    action  = decide(outcome, history, policy)
        PROCEED              the step is in the model
        RETRY_SMALLER_SCALE  same batch again, loss scale halved
        SKIP_BATCH           batch given up, its row ids are in the journal
        HALT                 stop; the last good state stands
    journal the step, tell the observers
    evaluate, sample, save where due
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from finitune.core.errors import Halted
from finitune.core.journal import Journal
from finitune.core.types import Verdict
from finitune.engine.codes import JOURNAL_LOST, NOTHING_LEARNT, TOO_MANY_ABORTS
from finitune.engine.judge import Judge
from finitune.engine.line import is_clean
from finitune.engine.policy import Action, Policy, decide, is_scale_overflow
from finitune.engine.step import Outcome, transact
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
    """A run in progress; built by ``train/run.py``."""

    port: TrainPort
    judge: Judge
    policy: Policy
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
        """One transaction, its consequence, its journal line. Raises Halted."""
        port, state = self.port, self.port.state
        outcome = transact(port, self.judge, state.history)
        scale_left = state.scaler is not None and not state.scaler.exhausted
        action = decide(outcome.judgement, outcome.reading, state.history, self.policy, scale_left=scale_left)
        time_s = port.elapsed_s()
        self.step_time_s += time_s
        self.num_transactions += 1
        self._record(outcome, action, time_s)
        self._settle(outcome, action)
        event = StepEvent(
            outcome.reading, outcome.judgement, action, outcome.rows, self.total_steps, state.updates, time_s
        )
        self.observers.tell("step", event)
        if action is Action.HALT:
            raise self._too_many(outcome)
        self._halt_if_still(outcome)
        return action

    def _record(self, outcome: Outcome, action: Action, time_s: float) -> None:
        reading, judgement = outcome.reading, outcome.judgement
        self.counts.update(f.code for f in judgement.findings)
        self._write(
            "step",
            attempt=self.port.state.attempt + 1,
            **reading.to_json() | {"time_s": round(time_s, 4), "amax": loudest(reading.amax)},
            verdict=judgement.verdict.value,
            action=action.value,
            rows=[str(r) for r in outcome.rows],
            findings=[f.to_json() for f in judgement.findings],
        )

    def _settle(self, outcome: Outcome, action: Action) -> None:
        """Carry the decision out, and journal what it did to the loss scale."""
        scaler = self.port.state.scaler
        was = scaler.scale if scaler is not None else None
        clean = is_clean(action, (f.severity.value for f in outcome.judgement.findings))
        self.port.settle(action, outcome.reading, clean=clean)
        if scaler is not None and action is not Action.PROCEED and is_scale_overflow(outcome.reading):
            self._write("decision", step=outcome.reading.step, what="loss_scale", was=was, now=scaler.scale)

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
            limit=self.policy.max_aborts_in_a_row,
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

    def _write(self, kind: str, **record: object) -> None:
        record_or_halt(self.journal, kind, **record)


def loudest(amax: Mapping[str, float], count: int = 3) -> dict[str, float]:
    """The modules with the largest magnitudes, non-finite ones first: all of them would be most of the journal."""
    names = sorted(amax, key=lambda n: (math.isfinite(amax[n]), -amax[n] if math.isfinite(amax[n]) else 0.0))
    return {name: amax[name] for name in names[:count]}


def record_or_halt(journal: Journal, kind: str, **record: object) -> None:
    """Journal a record. Raises Halted where the disk refuses: nothing may happen unrecorded."""
    try:
        journal.write(kind, **record)
    except OSError as error:
        run = str(journal.path.parent)
        raise Halted(JOURNAL_LOST, path=str(journal.path), error=str(error), run=run) from error
