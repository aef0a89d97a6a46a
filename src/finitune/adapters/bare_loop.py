"""The guard of a loop that goes on where a plain one would."""

from __future__ import annotations

from dataclasses import replace

from finitune.adapters.bare import BarePort
from finitune.core.incident import Trigger
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
        was = turn.outcome
        if was.committed or turn.action is Action.TREAT or not self.port.benign_overflow(was.reading):
            return False
        notes = tuple(replace(f, severity=Severity.NOTE) for f in was.judgement.findings)
        turn.outcome = Outcome(was.reading, Judgement(was.judgement.verdict, notes), was.rows)
        turn.action = Action.SKIP_BATCH
        return True
