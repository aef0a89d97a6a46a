"""Triage: is this a failure that has to be investigated, and of which kind? A pure function of what was judged."""

from __future__ import annotations

import math

from finitune.core.incident import Trigger
from finitune.core.types import Finding, Judgement, Reading, Severity
from finitune.engine.policy import Action, is_scale_overflow

# Codes that name a failure which no single step shows.
RUNAWAY_CODES = ("OPT002", "OPT003")
_FORECAST = ("NUM031",)
# Codes of faults by which nothing fails: an update that goes uphill, a loss that is computed in another way.
_SILENT = ("OPT120", "OPT121")
_HARMLESS = ("DAT100",)


def triage(judgement: Judgement, reading: Reading, action: Action, *, act_on_forecast: bool) -> Trigger | None:
    """The kind of failure; None where nothing has failed, or nothing that needs a cure.

    Not a failure: an overflow that a smaller loss scale answers, and a batch in which nothing is supervised.
    """
    if action is Action.RETRY_SMALLER_SCALE:
        return None
    codes = {f.code for f in judgement.findings}
    if action is Action.PROCEED:
        if codes.intersection(RUNAWAY_CODES):
            return Trigger.RUNAWAY
        if codes.intersection(_SILENT):
            return Trigger.SILENT
        return Trigger.FORECAST if act_on_forecast and codes.intersection(_FORECAST) else None
    if codes.intersection(_HARMLESS):
        return None
    if not math.isfinite(reading.loss):
        return Trigger.LOSS
    if not math.isfinite(reading.grad_norm):
        return Trigger.SCALE if is_scale_overflow(reading) else Trigger.GRADIENT
    return Trigger.OUTLIER


def cause_of(trigger: Trigger, judgement: Judgement) -> Finding:
    """The finding that a failure is filed under: the gravest that asked for a veto, or the one that triggered it."""
    wanted = {Trigger.RUNAWAY: RUNAWAY_CODES, Trigger.FORECAST: _FORECAST, Trigger.SILENT: _SILENT}.get(trigger)
    grave = [Severity.ERROR, Severity.WARNING, Severity.NOTE]
    # What a look found before the first step is silent as well, and has a veto: nothing is committed before it is over.
    found = [f for f in judgement.findings if f.code in (wanted or ())] or [f for f in judgement.findings if f.veto]
    return min(found, key=lambda f: grave.index(f.severity))
