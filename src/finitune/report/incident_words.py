"""Parts of an incident in words: values, places, reasons, plans. Every function takes whatever a record may hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from finitune.core import registry
from finitune.core.chain import number
from finitune.core.codes import all_codes, fill
from finitune.core.incident import Cause, Evidence, Incident, Result, Suspect, Trial, Trigger
from finitune.core.messages.catalogue import language, text
from finitune.core.units import duration_text
from finitune.report.words import width

_SPELT = ("NaN", "Infinity", "-Infinity")
_MANY = 4
_LONGEST_CHARS = 300
_SHOWN_IN_MINUTES_FROM_S = 60.0
_LIMITS = {"float16": 65504.0, "fp16": 65504.0}
_PREFIXES = ("cause: ", "原因：")
_NOT_A_MEMBER = (LookupError, TypeError, ImportError, AttributeError, OSError, RuntimeError, ValueError)


def clean(words: str) -> str:
    r"""``words`` on one line of a terminal: what is not printable becomes an escape such as ``\x1b``."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in words)


def value_text(value: Any) -> str:
    """A value of a record: numbers with five digits, lists by their first members, everything on one line."""
    if isinstance(value, str) and value in _SPELT:
        value = number(value)
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, (list, tuple)):
        rest = ["..."] if len(value) > _MANY else []
        return ", ".join([*map(value_text, value[:_MANY]), *rest])
    if isinstance(value, Mapping):
        return ", ".join(f"{clean(str(k))} {value_text(v)}" for k, v in list(value.items())[:_MANY])
    return cut(clean(str(value)), _LONGEST_CHARS)


def cut(words: str, columns: int) -> str:
    """``words``, or as much as fits so many columns, and three dots."""
    if width(words) <= columns:
        return words
    kept = words
    while kept and width(kept) > columns - 3:
        kept = kept[:-1]
    return kept.rstrip() + "..."


def filled(data: Mapping[str, Any]) -> dict[str, Any]:
    """Values for a template: texts, so that nothing of them is read as a template or a command."""
    return {clean(str(k)): value_text(v) for k, v in data.items()}


# -- what and where -------------------------------------------------------------------------------------------------


def what_text(incident: Incident) -> str:
    """How it failed, and whether that repeats."""
    numbers = {k: value_text(incident.reading.get(k, "?")) for k in ("loss", "grad_norm")}
    failed = text(f"incidents.trigger.{incident.trigger.value}", **numbers)
    if incident.verdict is None:
        return failed
    return text("incidents.what", failed=failed, verdict=text(f"incidents.verdict.{incident.verdict.value}"))


def main_suspect(incident: Incident, *kinds: str) -> Suspect | None:
    """The suspect to show: where the top cause names one, that; else the first."""
    found = [s for s in incident.suspects if not kinds or s.kind in kinds]
    where = incident.diagnosis.top.where if incident.diagnosis.top else ""
    return next((s for s in found if s.name == where), found[0] if found else None)


def suspect_text(suspect: Suspect) -> str:
    """One suspect with its numbers."""
    parts = [cut(clean(suspect.name), 80), *_numbers_of(suspect.data)]
    return " ".join(parts if suspect.kind in ("row", "tokens") else [_kind_text(suspect.kind), *parts])


def _kind_text(kind: str) -> str:
    try:
        return text(f"incidents.kind.{kind}")
    except KeyError:  # of another version
        return clean(kind)


def _numbers_of(data: Mapping[str, Any]) -> list[str]:
    parts = []
    dtype = str(data.get("dtype", "")).removeprefix("torch.")
    limit = _LIMITS.get(dtype)
    if limit is not None and _is_beyond(data.get("value"), limit) and "index" not in data:
        numbers = {n: value_text(data.get(n)) for n in ("num_bad", "num_elements")}
        return [
            text("incidents.where.beyond", value=_whole(data["value"]), dtype=dtype, limit=_whole(limit), **numbers)
        ]
    if "amax" in data or "input_amax" in data:
        parts += _made(data, dtype, limit)
    if _is_known(data.get("value")) and "index" in data:
        index = value_text(data["index"])
        parts.append(text("incidents.where.value", value=value_text(data["value"]), index=f"[{index}]"))
    if "since_step" in data:
        since = data["since_step"]
        key = "incidents.where.origin" if since is None else "incidents.where.since"
        parts.append(text(key, step=value_text(since)))
    if "span" in data:
        parts.append(text("incidents.where.span", span=_span(data["span"])))
    return parts


def _made(data: Mapping[str, Any], dtype: str, limit: float | None) -> list[str]:
    """What an operation put out, and of what. A number that is not known, or of finite members only, is left out."""
    parts = []
    counts = {n: value_text(data.get(n)) for n in ("num_bad", "num_elements")}
    if limit is None and _is_count(data.get("num_bad")) and _is_count(data.get("num_elements")):
        what = "NaN" if data.get("nan") is True else "inf"
        parts.append(text("incidents.where.made", what=what, **counts))
    elif _is_known(data.get("amax")):
        key = "incidents.where.amax_only" if limit is None else "incidents.where.amax"
        parts.append(text(key, amax=_whole(data["amax"]), dtype=clean(dtype), limit=_whole(limit)))
    if data.get("constant") is not None:  # its magnitude says nothing: -inf stands in it
        parts.append(text("incidents.where.constant", value=value_text(data["constant"])))
    elif _is_known(data.get("input_amax")):
        parts.append(text("incidents.where.input", input_amax=_whole(data["input_amax"])))
    return parts


def _is_known(value: Any) -> bool:
    return value is not None and not (isinstance(value, (list, tuple, Mapping)) and not value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_beyond(value: Any, limit: float) -> bool:
    """A finite number that the format does not hold."""
    return isinstance(value, (int, float)) and math.isfinite(value) and abs(value) > limit


def _span(value: Any) -> str:
    return (
        "-".join(map(value_text, value)) if isinstance(value, (list, tuple)) and len(value) == 2 else value_text(value)
    )


def _whole(value: Any) -> str:
    """A magnitude: whole numbers in full, for 65822 against 65504 is the point."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 1000 <= abs(value) < 1e7:
        return f"{value:.0f}"
    return value_text(value)


# -- why ------------------------------------------------------------------------------------------------------------


def cause_title(code: str) -> str:
    """The title of a cause's page, without the word "cause"."""
    page = all_codes().get(code)
    title = page.text(language()).title if page else text("runs.unknown_code")
    for prefix in _PREFIXES:
        title = title.removeprefix(prefix)
    return title


def cause_what(cause: Cause) -> str:
    """What the page of a cause says of this case."""
    page = all_codes().get(cause.code)
    return fill(page.text(language()).what, filled(cause.data)) if page else ""


def why_text(incident: Incident) -> str:
    """The cause with its confidence, or "unknown"."""
    top = incident.diagnosis.top
    if top is None:
        key = "unknown" if incident.evidence else "not_looked"
        return text(f"incidents.why.{key}", count=len(incident.evidence))
    key = "named" if top.named else "suspected"
    code, confidence = clean(top.code), f"{100 * top.confidence:.0f}"
    return text(f"incidents.why.{key}", code=code, title=cause_title(top.code), confidence=confidence)


def reason_texts(incident: Incident, names: Sequence[str]) -> list[str]:
    """What each reason says; experiments first, for they are what was tried."""
    by_name = {e.experiment: e for e in incident.evidence}
    tried = [evidence_text(by_name[n]) for n in names if n in by_name]
    return tried + [_plain_reason(incident, n) for n in names if n not in by_name]


def _plain_reason(incident: Incident, name: str) -> str:
    repeats = incident.verdict is not None and incident.verdict.value == "reproduced"
    key = "not_verdict" if name == "verdict" and not repeats else name
    try:
        return text(f"incidents.reason.{key}")
    except KeyError:
        return clean(name)


def evidence_text(evidence: Evidence) -> str:
    """What an experiment showed, in its own words."""
    numbers = filled(evidence.numbers)
    says = getattr(_member("experiments", evidence.experiment), "SAYS", None)
    words = says.get(evidence.result) if isinstance(says, Mapping) else None
    if words is not None:
        return clean(words.say(numbers))
    if evidence.result is Result.NOT_RUN:
        return text("incidents.not_run", name=clean(evidence.experiment), reason=numbers.get("reason", "?"))
    known = ", ".join(f"{k} {v}" for k, v in numbers.items())
    return f"{clean(evidence.experiment)}: {evidence.result.value}" + (f" ({cut(known, 120)})" if known else "")


def _member(family: str, name: str | None) -> ModuleType | None:
    """A registered member; None where this version does not have it."""
    try:
        return registry.load(family, str(name)) if name else None
    except _NOT_A_MEMBER:
        return None


# -- what was done --------------------------------------------------------------------------------------------------


def applied(incident: Incident) -> Trial | None:
    """The trial of the plan that was applied."""
    held = [t for t in incident.trials if t.holds]
    return held[-1] if held and incident.remedy else None


def plan_data(trial: Trial | None) -> dict[str, Any]:
    """Numbers for the words of a remedy."""
    data = trial.plan.get("data") if trial is not None else None
    return filled(data) if isinstance(data, Mapping) else {}


def remedy_text(name: str | None, trial: Trial | None, which: str = "SAYS") -> str:
    """What a remedy does (``SAYS``), or what it advises (``ADVICE``); its name where it does not say."""
    words = getattr(_member("remedies", name), which, None)
    if words is not None and hasattr(words, "say"):
        return clean(words.say(plan_data(trial)))
    return clean(str(name)) if which == "SAYS" else ""


def proof_text(incident: Incident) -> str:
    """Which plan held on the replay, and how far."""
    if not incident.trials:
        return text("incidents.proof.untried")
    held = [t for t in incident.trials if t.holds]
    last = held[-1] if held else incident.trials[-1]
    remedy = clean(str(last.plan.get("remedy", "?")))
    if not held:
        reason = cut(clean(last.reason), 120)
        return text("incidents.proof.none", count=len(incident.trials), remedy=remedy, reason=reason)
    past, losses = max(0, len(last.losses) - 1), ", ".join(f"{x:.4g}" for x in last.losses[:_MANY]) or "-"
    said = text(
        "incidents.proof.holds" if past else "incidents.proof.holds_now", remedy=remedy, past=past, losses=losses
    )
    failed = sum(not t.holds for t in incident.trials)
    return said + (text("incidents.proof.after", count=failed) if failed else "")


_NOTHING_REFUSED = (Trigger.SILENT, Trigger.RUNAWAY, Trigger.FORECAST)
"""Incidents about a run, not about the batch at hand: it was trained on."""


def outcome_of(incident: Incident) -> str:
    """One of the known outcomes, or "open"."""
    known = ("cured", "passed", "skipped", "observed", "halted")
    return incident.outcome if incident.outcome in known else "open"


def done_text(incident: Incident) -> str:
    """What was done about it."""
    outcome = outcome_of(incident)
    words = remedy_text(incident.remedy, applied(incident)) if incident.remedy else ""
    if outcome == "observed" and incident.trigger in _NOTHING_REFUSED:
        outcome = "watched"
    return text(f"incidents.done.{outcome}", words=words, phase=text(f"incidents.phase.{incident.phase.value}"))


def cost_text(incident: Incident) -> str:
    """Replays, time, and what was given up."""
    lost = []
    if incident.steps_lost:
        lost.append(text("incidents.cost.steps", count=incident.steps_lost))
    rows = rows_given_up(incident)
    if rows:
        lost.append(text("incidents.cost.rows", count=rows))
    time_s = incident.time_s
    shown = (
        duration_text(time_s)
        if time_s >= _SHOWN_IN_MINUTES_FROM_S
        else text("incidents.seconds", count=f"{time_s:.1f}")
    )
    what = ", ".join(lost) or text("incidents.cost.nothing")
    return text("incidents.cost", replays=f"{incident.replays:g}", time=shown, lost=what)


def rows_given_up(incident: Incident) -> int:
    """Rows of the batch that were not trained on because of it."""
    if incident.outcome == "observed" and incident.trigger in _NOTHING_REFUSED:
        return 0
    if incident.outcome in ("observed", "skipped"):
        return len(incident.rows)
    trial = applied(incident)
    conditions = trial.plan.get("conditions") if trial is not None else None
    kept_out = conditions.get("quarantine", ()) if isinstance(conditions, Mapping) else ()
    hashes = {r.digest for r in incident.rows}
    return len(hashes & {str(h) for h in kept_out}) if isinstance(kept_out, (list, tuple)) else 0


def advice_texts(incident: Incident) -> list[str]:
    """What to change in the recipe: the remedy's advice, else the cures on the page of the cause."""
    advice = remedy_text(incident.remedy, applied(incident), "ADVICE") if incident.remedy else ""
    top = incident.diagnosis.top
    page = all_codes().get(top.code) if top is not None and (top.named or not advice) else None
    cures = [fill(c, filled(top.data)) for c in page.text(language()).cures] if page is not None and top else []
    return [advice, *cures] if advice else cures
