"""One step is a transaction: compute -> judge -> commit | abort.

trace    = port.forward_backward()        loss and gradients; the training state is untouched
reading  = read(trace)                    one host read, before clipping
judgement = judge(history, reading)       every detector; NaN counts as bad
COMMIT   -> port.commit(reading)          weights, moments, schedule, scaler, cursor, statistics
ABORT    -> port.abort()                  all of them bit for bit as before
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finitune.core.robust import History
from finitune.core.types import Judgement, Reading, RowId, Verdict
from finitune.detectors.nothing_to_train import NOTHING_TO_TRAIN
from finitune.engine.judge import Judge
from finitune.engine.monitor import read
from finitune.engine.named_rows import with_rows
from finitune.engine.port import Port, Unit


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
    judgement, rows = _with_rows(judgement, port, trace.rows)
    return Outcome(reading, judgement, rows, trace.num_tokens)


def _with_rows(judgement: Judgement, port: Port, rows: tuple[RowId, ...]) -> tuple[Judgement, tuple[RowId, ...]]:
    """A finding of a batch without any target is about every row of it; a detector knows only numbers."""
    mute = [f for f in judgement.findings if f.code == NOTHING_TO_TRAIN.code and not f.rows]
    if not mute:
        return judgement, rows
    units = _units(port) or [Unit(0, index, (row,)) for index, row in enumerate(rows)]
    told = [with_rows(f, units) if f in mute else f for f in judgement.findings]
    return Judgement(judgement.verdict, tuple(told)), rows or tuple(row for unit in units for row in unit.rows)


def _units(port: Port) -> Sequence[Unit]:
    """The rows of the refused batch with their places; none where the port cannot tell them."""
    units = getattr(port, "units", None)
    try:
        return tuple(units()) if units is not None else ()
    except Exception:  # noqa: BLE001 (names may come from any function of a script: they may not cost the step)
        return ()
