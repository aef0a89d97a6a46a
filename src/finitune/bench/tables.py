"""The score as Markdown: what a reader wants to know first, then every family, every contender, every healthy run."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from finitune.bench.score import Record, by_contender, by_name, scored, summary
from finitune.core.registry import load

_PACKAGES = ("torch", "transformers", "peft", "lightning", "stabilityguard", "sherlorch", "pytorch_optimizer")
_TARGETS: Mapping[str, tuple[str, str]] = {
    "detection_rate": ("faults noticed", "100 %"),
    "poisoned_steps": ("committed steps that left a non-finite state", "0"),
    "poisoned_trusted_checkpoints": ("checkpoints with a non-finite value", "0"),
    "place_accuracy": ("right place (module, parameter, row, ...)", ">= 95 %"),
    "cause_top1": ("right cause, first named", ">= 90 %"),
    "cause_wrong": ('wrong cause (the rest said "unknown")', "<= 2 %"),
    "cured_within_1pct": ("final loss within 1 % of the clean run, where curable", ">= 90 %"),
    "interventions_healthy": ("interventions in healthy runs", "0"),
    "findings_per_10k_healthy": ("findings per 10,000 healthy steps", "<= 1"),
    "overhead_median": ("cost of a healthy step", "<= 2 %"),
}
_SHARES = frozenset(k for k, (_, target) in _TARGETS.items() if "%" in target)


def markdown(records: Sequence[Record], ours: str, command: str) -> str:
    """The whole page."""
    sides = by_contender(records)
    own = sides.get(ours, [])
    parts = [
        "# FaultBench",
        _made(command, records),
        "## Summary",
        _summary_table(own),
        "## Contenders",
        _contenders_table(sides),
        "## Families",
        _families_table(own),
        "## Healthy runs",
        _healthy_table(own),
        _left_over(records),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def versions() -> dict[str, str]:
    """Versions of what was measured and measured with."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("finitune", *_PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def today() -> str:
    """The date, UTC."""
    return datetime.now(timezone.utc).date().isoformat()


def commit() -> str:
    """The commit of the working copy that the package runs from; "" where it runs from none."""
    import subprocess

    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return ""
    asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10)  # noqa: S603
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _made(command: str, records: Sequence[Record]) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    seeds = sorted({r["seed"] for r in records if r["kind"] == "faults"})
    shown = f"seeds {seeds[0]} to {seeds[-1]}" if seeds else "no faults"
    return f"`{command}` on {today()}, commit {commit() or 'unknown'}, {shown}. {packages}."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; pipes in cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def shown(key: str, value: float | None) -> str:
    """A number of the summary."""
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if key in _SHARES else f"{value:.3g}"


def _summary_table(own: Sequence[Record]) -> str:
    score = summary(own)
    rows = []
    for key, (says, target) in _TARGETS.items():
        entry = score["rates"].get(key)
        low_high = entry and entry["interval"]
        span = f"{100 * low_high[0]:.1f} to {100 * low_high[1]:.1f} %" if low_high else ""
        of = f"{entry['hits']} of {entry['count']}" if entry else ""
        rows.append([says, shown(key, score[key]), target, of, span])
    return table(["", "measured", "target", "cases", "95 % interval"], rows)


def _contenders_table(sides: Mapping[str, Sequence[Record]]) -> str:
    keys = [k for k in _TARGETS if k not in ("interventions_healthy", "findings_per_10k_healthy", "overhead_median")]
    rows = []
    for name, side in sides.items():
        score = summary(side)
        if score["cases"]:
            meant = load("contenders", name).MEANT_FOR
            rows.append([name, meant, str(score["cases"]), *(shown(k, score[k]) for k in keys)])
    return table(["contender", "meant for", "cases", *(_TARGETS[k][0] for k in keys)], rows)


def _families_table(own: Sequence[Record]) -> str:
    faults = scored([r for r in own if r["kind"] == "faults"])
    rows = []
    for name, score in sorted(by_name(faults).items(), key=lambda item: _class_of(faults, item[0])):
        family = [r for r in faults if f"faults/{r['name']}" == name]
        said = sorted({code for r in family for code in r["cause_said"]} - {""})
        rows.append(
            [
                family[0]["fault_class"],
                name.partition("/")[2],
                *(_of(score, key) for key in ("detection_rate", "place_accuracy", "cause_top1")),
                ", ".join(said[:4]),
                _of(score, "remedy_right"),
                _of(score, "cured_within_1pct"),
                _percents(family),
                str(score["poisoned_steps"]),
                f"{score['replays_median']:.0f}" if score["replays_median"] is not None else "-",
            ]
        )
    head = [
        "class",
        "fault",
        "noticed",
        "place",
        "cause",
        "said",
        "remedy",
        "cured",
        "final loss",
        "poisoned",
        "replays",
    ]
    return table(head, rows)


def _class_of(faults: Sequence[Record], name: str) -> tuple[str, str]:
    return next((r["fault_class"], name) for r in faults if f"faults/{r['name']}" == name)


def _of(score: Mapping[str, Any], key: str) -> str:
    entry = score["rates"][key]
    return f"{entry['hits']}/{entry['count']}" if entry["count"] else "-"


def _percents(family: Sequence[Record]) -> str:
    percents = sorted(r["percent"] for r in family if r["curable"] and r["percent"] is not None)
    dead = sum(1 for r in family if r["curable"] and r["percent"] is None)
    span = f"{percents[0]:+.1f} to {percents[-1]:+.1f} %" if percents else ""
    return ", ".join(part for part in (span, f"{dead} x nan" if dead else "") if part) or "-"


def _healthy_table(own: Sequence[Record]) -> str:
    controls = scored([r for r in own if r["kind"] == "controls"])
    rows = []
    for name, score in by_name(controls).items():
        calm = score["healthy"]
        codes = sorted({c for r in controls if f"controls/{r['name']}" == name for c in r["codes"]})
        same = calm["bit_identical"]
        rows.append(
            [
                name.partition("/")[2],
                str(calm["healthy_steps"]),
                f"{calm['findings_per_10k_healthy']:.2g}",
                str(calm["interventions_healthy"]),
                f"{same['hits']}/{same['count']}",
                ", ".join(codes),
            ]
        )
    return table(["run", "steps", "findings per 10,000", "interventions", "same bits as unguarded", "codes"], rows)


def _left_over(records: Sequence[Record]) -> str:
    skipped = sorted({f"{r['contender']}: {r['skipped']}" for r in records if "skipped" in r})
    defects = [f"{r['key']}: {r['defect']}" for r in records if "defect" in r]
    parts = []
    if skipped:
        parts.append("## Left out\n\n" + "\n".join(f"- {line}" for line in skipped))
    if defects:
        parts.append("## Defects of the bench\n\n" + "\n".join(f"- {line}" for line in defects))
    return "\n\n".join(parts)
