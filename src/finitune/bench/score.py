"""From the records of cases to rates with confidence intervals. Plain values; no tensors.

Rates are over cases; their intervals are Wilson's at 95 % (Wilson 1927, "Probable inference, the law of succession,
and statistical inference"), which stay honest at 0 and at 1 and for few cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

Record = dict[str, Any]
Z_95 = 1.959963984540054
KEYS = (
    "detection_rate",
    "poisoned_steps",
    "poisoned_trusted_checkpoints",
    "place_accuracy",
    "cause_top1",
    "cause_wrong",
    "cured_within_1pct",
    "interventions_healthy",
    "findings_per_10k_healthy",
    "overhead_median",
)


def wilson(hits: int, count: int) -> tuple[float, float] | None:
    """The 95 % interval of a rate; None for no case."""
    if count <= 0:
        return None
    rate, z2 = hits / count, Z_95**2
    centre = (rate + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 / (1 + z2 / count) * math.sqrt(rate * (1 - rate) / count + z2 / (4 * count**2))
    # At the ends the formula is 0 or 1 but for rounding.
    low, high = (0.0 if hits == 0 else centre - half), (1.0 if hits == count else centre + half)
    return low, high


def rate(records: Iterable[Record], of: Callable[[Record], bool | None]) -> dict[str, Any]:
    """``value``, ``hits``, ``count`` and ``interval`` over the records for which ``of`` is not None."""
    marks = [mark for mark in map(of, records) if mark is not None]
    hits = sum(marks)
    return {
        "value": hits / len(marks) if marks else None,
        "hits": hits,
        "count": len(marks),
        "interval": wilson(hits, len(marks)),
    }


def scored(records: Iterable[Record]) -> list[Record]:
    """Records that were run to their end."""
    return [r for r in records if "skipped" not in r and "defect" not in r]


def rates(faults: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """All rates of a set of faulty runs."""
    return {
        "detection_rate": rate(faults, lambda r: bool(r["detected"])),
        "place_accuracy": rate(faults, lambda r: r["place"]),
        "cause_top1": rate(faults, lambda r: r["cause"] == "right"),
        "cause_wrong": rate(faults, lambda r: r["cause"] == "wrong"),
        "cause_unknown": rate(faults, lambda r: r["cause"] not in ("right", "wrong")),
        "remedy_right": rate(faults, lambda r: r["remedy"]),
        "cured_within_1pct": rate(faults, lambda r: r["cured"]),
    }


def healthy(controls: Sequence[Record]) -> dict[str, Any]:
    """What was said and done on healthy runs."""
    steps = sum(r["steps"] for r in controls)
    findings = sum(r["findings"] for r in controls)
    return {
        "healthy_steps": steps,
        "healthy_runs": len(controls),
        "interventions_healthy": sum(r["interventions"] for r in controls) if controls else None,
        "findings_per_10k_healthy": 1e4 * findings / steps if steps else None,
        "bit_identical": rate(controls, lambda r: r["same_bits"]),
    }


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """The summary of one contender: the plain numbers under :data:`KEYS`, the rest beside them."""
    done = scored(records)
    faults = [r for r in done if r["kind"] == "faults"]
    found, calm = rates(faults), healthy([r for r in done if r["kind"] == "controls"])
    overheads = [r["ratio"] - 1 for r in done if r["kind"] == "overhead"]
    treated = [r for r in faults if r["incidents"]]
    return {
        **{name: entry["value"] for name, entry in found.items()},
        "poisoned_steps": sum(r["poisoned_steps"] for r in faults) if faults else None,
        "poisoned_weight_steps": sum(r["poisoned_weight_steps"] for r in faults) if faults else None,
        "poisoned_trusted_checkpoints": sum(r["poisoned_checkpoints"] for r in faults) if faults else None,
        **{name: calm[name] for name in ("interventions_healthy", "findings_per_10k_healthy")},
        "overhead_median": median(overheads) if overheads else None,
        "cases": len(faults),
        "families": len({r["name"] for r in faults}),
        "skipped": sum("skipped" in r for r in records),
        "defects": sum("defect" in r for r in records),
        "replays_median": median(r["replays"] for r in treated) if treated else None,
        "healthy": calm,
        "rates": found,
    }


def by_name(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """The same for every fault, control and overhead model by itself."""
    names = dict.fromkeys(f"{r['kind']}/{r['name']}" for r in records)
    return {name: summary([r for r in records if f"{r['kind']}/{r['name']}" == name]) for name in names}


def by_contender(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records of each contender, in the order in which they come up."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["contender"], []).append(record)
    return found


def _slim(score: dict[str, Any]) -> dict[str, Any]:
    """A summary without what its numbers were made from: there is one for every case and contender."""
    return {key: value for key, value in score.items() if key not in ("rates", "healthy")}


def whole(records: Sequence[Record], ours: str) -> dict[str, Any]:
    """The score as it is written to disk: ours at the top, every contender below, and what failed."""
    sides = by_contender(records)
    own = sides.get(ours, [])
    return {
        "summary": {key: summary(own)[key] for key in KEYS},
        "intervals": {k: v["interval"] for k, v in summary(own)["rates"].items()},
        "contenders": {name: summary(side) for name, side in sides.items()},
        "cases": {name: {case: _slim(s) for case, s in by_name(side).items()} for name, side in sides.items()},
        "defects": [{"key": r["key"], "defect": r["defect"]} for r in records if "defect" in r],
        "skipped": sorted({(r["contender"], r["skipped"]) for r in records if "skipped" in r}),
    }
