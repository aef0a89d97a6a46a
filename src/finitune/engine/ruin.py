"""Whether a run may go on after an incident for which nothing was found to do."""

from __future__ import annotations

from finitune.core import registry
from finitune.core.incident import Incident, Trigger
from finitune.engine.investigate import Found
from finitune.engine.plan import Plan


def ruins(incident: Incident) -> bool:
    """The run runs away, or is silently spoilt, for a cause that is named and has no remedy: every step is lost.

    A cause may say that it does no such thing, or that it does although nothing runs away (``RUINS``).
    """
    top = incident.diagnosis.top
    if incident.trigger not in (Trigger.RUNAWAY, Trigger.SILENT) or top is None or not top.named:
        return False
    cause = registry.load("causes", top.name)
    return not cause.REMEDIES and bool(getattr(cause, "RUINS", incident.trigger is Trigger.RUNAWAY))


def plan_of(incident: Incident, found: Found | None) -> Plan | None:
    """The plan that was proved. For a silent fault with a named cause and no remedy, that nothing fails is no proof."""
    if found is None or found.plan is None:
        return None
    top = incident.diagnosis.top
    known = incident.trigger is Trigger.SILENT and top is not None and top.named
    return None if known and top and not registry.load("causes", top.name).REMEDIES else found.plan
