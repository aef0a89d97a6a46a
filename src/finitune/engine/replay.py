"""Replay: the failing step once more in place, nothing changed. Everything after it rests on the answer.

reproduced       the same numbers, bit for bit, or at least the same failure every time
not reproduced   it comes and goes: a race, the hardware or randomness that nobody seeds; data and rate are not to blame
not replayable   the port cannot compute the step again; said openly, and nothing is concluded
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from finitune.core.incident import Evidence, Result, Trigger, Verdict
from finitune.core.types import Reading
from finitune.engine.case import Case
from finitune.engine.conditions import NotPossible
from finitune.engine.lab import Lab

SAME_AGAIN = "same_again"
_MORE_TRIES = 2


def same_again(lab: Lab, case: Case) -> Case:
    """The case with the verdict on whether the failure repeats, and its evidence. Raises BudgetSpent."""
    if case.trigger in (Trigger.RUNAWAY, Trigger.FORECAST, Trigger.SILENT):
        # The step itself did not fail; that the run repeats was tried at its start and is checked by every redo.
        return replace(case, verdict=Verdict.REPRODUCED)
    try:
        shots = [lab.shoot()]
        equal = same_bits(case.reading, shots[0].reading)
        if not shots[0].bad or not equal:
            shots += [lab.shoot() for _ in range(_MORE_TRIES)]
    except NotPossible as reason:
        return _not_replayable(case, str(reason))
    num_bad = sum(s.bad for s in shots)
    verdict = Verdict.REPRODUCED if num_bad == len(shots) else Verdict.NOT_REPRODUCED
    numbers: dict[str, Any] = {"equal": equal, "num_bad": num_bad, "num_tries": len(shots)}
    numbers |= {"loss": shots[0].reading.loss, "grad_norm": shots[0].reading.grad_norm}
    result = Result.BAD if verdict is Verdict.REPRODUCED else Result.GOOD
    evidence = Evidence(SAME_AGAIN, result, numbers, float(len(shots)))
    return replace(case.with_evidence(evidence), verdict=verdict)


def _not_replayable(case: Case, reason: str) -> Case:
    evidence = Evidence(SAME_AGAIN, Result.NOT_RUN, {"reason": reason})
    return replace(case.with_evidence(evidence), verdict=Verdict.NOT_REPLAYABLE)


def same_bits(a: Reading, b: Reading) -> bool:
    """Whether loss and gradient norm have the same bits; a NaN equals any NaN (its payload is not part of a step)."""
    return all(_bits(x) == _bits(y) for x, y in ((a.loss, b.loss), (a.grad_norm, b.grad_norm)))


def _bits(value: float) -> bytes | str:
    return "nan" if value != value else struct.pack("<d", value)


def numbers_of(reading: Reading) -> Mapping[str, float]:
    """Loss and gradient norm, for an experiment's evidence."""
    return {"loss": reading.loss, "grad_norm": reading.grad_norm}
