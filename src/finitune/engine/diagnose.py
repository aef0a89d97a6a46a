"""Diagnosis: every registered cause weighs the case; the ranking of what they say. Pure: a case in, a diagnosis out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

from finitune.core import registry
from finitune.core.incident import Cause, Diagnosis, Verdict
from finitune.engine.case import Case
from finitune.engine.weight import Weight

MIN_CONFIDENCE = 0.1
"""Below this a cause is not worth a mention."""
REDONE = "redone_state"
"""The experiment that shows that something wrote into the training state."""
_BLAMES = ("DAT", "OPT")
"""Codes that blame the data or the learning rate: a failure that does not repeat is none of theirs."""


def diagnose(case: Case) -> Diagnosis:
    """The causes that fit the case, named ones first, then by confidence. None named: the cause is unknown.

    A cause that cannot be loaded or that fails while it weighs (a third party's) is left out with a RuntimeWarning:
    an incident must not end in an error of its own.
    """
    found = [cause for name in registry.names("causes") if (cause := _weighed(name, case)) is not None]
    return Diagnosis(tuple(sorted(found, key=lambda c: (not c.named, -c.confidence, c.name))))


def _weighed(name: str, case: Case) -> Cause | None:
    try:
        module = registry.load("causes", name)
        weight: Weight | None = module.weigh(case)
        if weight is None or not _is_kept(weight, module.CAUSE.code, case):
            return None
        return Cause(
            name,
            module.CAUSE.code,
            module.FAULT_CLASS,
            min(1.0, float(weight.confidence)),
            bool(weight.named),
            tuple(weight.reasons_for),
            tuple(weight.reasons_against),
            weight.where,
            dict(weight.data),
        )
    except Exception as error:  # noqa: BLE001 - code of third parties
        warnings.warn(f"the cause {name} could not weigh the case: {error!r}", RuntimeWarning, stacklevel=2)
        return None


def _is_kept(weight: Weight, code: str, case: Case) -> bool:
    """Worth a mention. A failure that comes and goes is explained by causes that rest on just that, and by no other."""
    if not weight.confidence >= MIN_CONFIDENCE or math.isinf(weight.confidence):
        return False
    if case.good(REDONE):  # what a state that was changed from outside makes of a step says nothing about the step
        return REDONE in weight.reasons_for
    if case.verdict is not Verdict.NOT_REPRODUCED:
        return True
    return "verdict" in weight.reasons_for and not code.startswith(_BLAMES)


def remedies_of(causes: Iterable[Cause]) -> Iterable[tuple[Cause, str]]:
    """Each cause with the names of its remedies, in the order of the causes, mildest remedy first."""
    for cause in causes:
        for remedy in registry.load("causes", cause.name).REMEDIES:
            yield cause, remedy
