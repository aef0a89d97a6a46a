"""The guard of a loop that goes on where a plain one would."""

from __future__ import annotations

from dataclasses import replace

from finitune.adapters.bare import BarePort
from finitune.core.incident import Incident, Trigger
from finitune.core.types import Judgement, Severity
from finitune.engine.guard import Guard, Turn
from finitune.engine.policy import Action
from finitune.engine.step import Outcome
from finitune.engine.treatment import Treatment


class LoopGuard(Guard):
    """A batch whose gradients overflow under a loss scale is no failure where a plain loop would just go on."""

    port: BarePort

    def _close(self, turn: Turn) -> None:
        self._as_plain(turn)
        super()._close(turn)

    def _incident(self, turn: Turn, trigger: Trigger, treatment: Treatment) -> Turn:
        if self._as_plain(turn):
            super()._close(turn)
            return turn
        return super()._incident(turn, trigger, treatment)

    def _as_plain(self, turn: Turn) -> bool:
        """Whether the turn is such a one; it is a note then, and the batch is given up."""
        was, port = turn.outcome, self.port
        if was.committed or turn.action is Action.TREAT:
            return False
        if not port.benign_overflow(was.reading) and not (self._is_told() and port.answers_overflow(was.reading)):
            return False
        notes = tuple(replace(f, severity=Severity.NOTE) for f in was.judgement.findings)
        turn.outcome = Outcome(was.reading, Judgement(was.judgement.verdict, notes), was.rows)
        turn.action = Action.SKIP_BATCH
        port.skips.note(port.state.history.overflows_in_a_row)
        return True

    def _is_told(self) -> bool:
        """These batches in a row had their incident, and nothing was done: the scaler goes on as in a plain loop."""
        state = self.port.state
        told = state.guard.get("incidents", ())
        first = state.step - state.history.overflows_in_a_row
        return bool(told) and not told[-1]["remedy"] and told[-1]["step"] > first

    def _halt(self, turn: Turn, incident: Incident) -> None:
        """Where no cure holds, a scaler that has a smaller scale left is no reason to stop: the batch is given up."""
        if incident.trigger is Trigger.SCALE and self.port.answers_overflow(turn.outcome.reading):
            turn.action = Action.SKIP_BATCH
            self._observed(turn, incident)
        else:
            super()._halt(turn, incident)
