"""One step is a transaction: compute -> judge -> commit | abort.

trace    = port.forward_backward()        loss and gradients; the training state is untouched
reading  = read(trace)                    one host read, before clipping
judgement = judge(history, reading)       every detector; NaN counts as bad
COMMIT   -> port.commit(reading)          weights, moments, schedule, scaler, cursor, statistics
ABORT    -> port.abort()                  all of them bit for bit as before
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from finitune.core.robust import History
from finitune.core.types import Judgement, Reading, RowId, Verdict
from finitune.detectors.nothing_to_train import NOTHING_TO_TRAIN
from finitune.engine.judge import Judge
from finitune.engine.monitor import read
from finitune.engine.port import Port


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one transaction came to."""

    reading: Reading
    judgement: Judgement
    rows: tuple[RowId, ...]
    num_tokens: int = 0

    @property
    def committed(self) -> bool:
        """The step changed the model."""
        return self.judgement.verdict is Verdict.COMMIT


def transact(port: Port, judge: Judge, history: History) -> Outcome:
    """Run one step as a transaction."""
    trace = port.forward_backward()
    reading = read(trace)
    judgement = judge.judge(history, reading)
    if judgement.verdict is Verdict.COMMIT:
        port.commit(reading)
    else:
        port.abort()
    return Outcome(reading, _with_rows(judgement, trace.rows), trace.rows, trace.num_tokens)


def _with_rows(judgement: Judgement, rows: tuple[RowId, ...]) -> Judgement:
    """A finding of a batch without any target is about every row of it; a detector knows only numbers."""
    if not any(f.code == NOTHING_TO_TRAIN.code and not f.rows for f in judgement.findings):
        return judgement
    told = [replace(f, rows=rows) if f.code == NOTHING_TO_TRAIN.code and not f.rows else f for f in judgement.findings]
    return Judgement(judgement.verdict, tuple(told))
