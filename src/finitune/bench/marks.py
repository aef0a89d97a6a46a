"""Marks of one case: what was expected against what was seen. Plain values; no tensors."""

from __future__ import annotations

import math
from typing import Any

from finitune.bench.witness import Witness
from finitune.bench.workload import Expected

WITHIN_PERCENT = 1.0
# Codes that say that nothing was wrong: they are right answers only where they are expected.
UNKNOWN = "unknown"
IDLE = (None, "let_pass")
"""Remedies that change nothing."""


def fault_marks(expected: Expected, witness: Witness, *, final: float, clean: float) -> dict[str, Any]:
    """The record of a faulty run."""
    detected_at = detection(expected, witness)
    told = causes(expected, witness)
    percent = 100 * (final / clean - 1) if math.isfinite(final) and math.isfinite(clean) and clean > 0 else None
    curable = bool(expected.reference)
    return {
        "says": expected.says,
        "expected": {
            "step": expected.step,
            "codes": list(expected.codes),
            "places": [list(p) for p in expected.places],
            "remedies": list(expected.remedies),
        },
        "detected": detected_at is not None,
        "detected_step": detected_at,
        "lag_steps": None if detected_at is None else detected_at - max(expected.step, 1),
        "early_alarms": len(witness.incidents) - len(about(expected, witness)),
        "poisoned_steps": len(witness.poisoned),
        "poisoned_weight_steps": len(witness.poisoned_weights),
        "poisoned_checkpoints": len(witness.poisoned_checkpoints),
        "checkpoints": witness.num_checkpoints,
        "place": place(expected, witness) if detected_at is not None or not expected.places else False,
        "cause": told,
        "cause_said": [i["code"] for i in witness.incidents] or sorted({s.code for s in witness.said}),
        "remedy": remedy(expected, witness),
        "remedy_said": remedies_of(witness),
        "curable": curable,
        "final_loss": final if math.isfinite(final) else None,
        "clean_loss": clean if math.isfinite(clean) else None,
        "percent": percent,
        "cured": (percent is not None and percent <= WITHIN_PERCENT) if curable else None,
        **_common(witness),
    }


def control_marks(says: str, witness: Witness, *, steps: int, same_bits: bool, plain_s: float) -> dict[str, Any]:
    """The record of a healthy run."""
    kept = [i for i in witness.incidents if i["remedy"] not in IDLE]
    return {
        "says": says,
        "steps": steps,
        "findings": len(witness.said),
        "codes": sorted({s.code for s in witness.said}),
        "finding_steps": [[s.step, s.code] for s in witness.said][:50],
        "interventions": len(kept) + (1 if witness.error else 0),
        "same_bits": same_bits,
        "plain_s": plain_s,
        **_common(witness),
    }


def _common(witness: Witness) -> dict[str, Any]:
    return {
        "refused": len(witness.refused),
        "error": witness.error,
        "replays": sum(float(i["replays"]) for i in witness.incidents),
        "incident_s": sum(float(i["time_s"]) for i in witness.incidents),
        "time_s": witness.time_s,
        "incidents": witness.incidents,
    }


def start_of(expected: Expected) -> int:
    """From which step on an alarm is about the fault: one before its effect counts as a forecast."""
    return expected.step - 1 if expected.step > 1 else 0


def about(expected: Expected, witness: Witness) -> list[dict[str, Any]]:
    """The incidents that are about the fault; earlier ones are false alarms, counted by themselves."""
    return [i for i in witness.incidents if i["step"] >= start_of(expected)]


def detection(expected: Expected, witness: Witness) -> int | None:
    """The first step at or after the effect (one before it counts for a forecast) at which something was found."""
    start = start_of(expected)
    steps = [s.step for s in witness.said if s.step >= start]
    steps += [i["step"] for i in about(expected, witness)]
    if witness.error and witness.error_step >= start:
        steps.append(witness.error_step)
    return min(steps) if steps else None


def causes(expected: Expected, witness: Witness) -> str | None:
    """Whether the cause is "right", "unknown" or "wrong"; None where the contender names no causes at all.

    The first incident about the fault counts, or a finding with a right code. A name that the fault forbids makes it
    wrong, be it of the first incident or of a later one that something was done about.
    """
    incidents = about(expected, witness)
    codes = {s.code for s in witness.said if s.code and s.step >= start_of(expected)}
    if not incidents:
        # A finding says what was seen, not why: only a cause can be wrong.
        return "right" if codes & set(expected.codes) else UNKNOWN if codes or witness.said else None
    named = set(incidents[0]["named"]) | {c for i in incidents[1:] if i["remedy"] not in IDLE for c in i["named"]}
    if expected.never and any(code.startswith(expected.never) for code in named - set(expected.codes)):
        return "wrong"
    first = incidents[0]["code"]
    if first in expected.codes or codes & set(expected.codes):
        return "right"
    return UNKNOWN if first == UNKNOWN else "wrong"


def place(expected: Expected, witness: Witness) -> bool | None:
    """Whether one of the expected places was named; None where none is expected."""
    if not expected.places:
        return None
    named = {(kind, name) for s in witness.said for kind, name in s.where}
    for incident in witness.incidents:
        named |= {(kind, name) for kind, name in incident["suspects"]} | {("cause", incident["where"])}
    return any(_same(kind, name, *seen) for kind, name in expected.places for seen in named)


def _same(kind: str, name: str, seen_kind: str, seen: str) -> bool:
    """Whether a named place is the expected one. Free places (a finding's, a cause's) may be of any kind."""
    if not seen or (seen_kind not in ("finding", "cause") and seen_kind != kind):
        return False
    if kind == "row":
        return seen.split("#")[0].endswith(name)
    return seen == name or seen.endswith(f".{name}") or seen.partition("|")[0] == name or seen.startswith(f"{name}[")


def remedies_of(witness: Witness) -> list[str]:
    """What was done, in order; "halt" where the run was stopped, "none" where nothing was."""
    done = [str(i["remedy"]) for i in witness.incidents if i["remedy"]]
    if witness.error:
        done.append("halt")
    return done or ["none"]


def remedy(expected: Expected, witness: Witness) -> bool | None:
    """Whether everything that was done is right, and something right was done; None where it is not scored."""
    if not expected.remedies:
        return None
    done = [d for d in remedies_of(witness) if d != "retry"] or remedies_of(witness)
    return done[0] in expected.remedies
