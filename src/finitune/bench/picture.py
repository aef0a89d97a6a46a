"""The score as one picture (SVG): a row for every fault, a column for every contender, a cell for what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from finitune.bench.cases import OURS
from finitune.bench.score import Record, by_contender, scored

FATES = {
    "cured": ("#1a7f4b", "final loss within 1 % of the clean run; where no loss tells: noticed, and treated rightly"),
    "went on": ("#c9b037", "noticed and trained on, worse than that"),
    "stopped": ("#4a6fa5", "stopped, with a finite state"),
    "unnoticed": ("#c77c48", "finite, nothing noticed"),
    "poisoned": ("#a32035", "non-finite weights or moments"),
}
_CELL, _GAP, _LEFT, _TOP, _RIGHT = 22, 2, 250, 150, 90
_FONT = "font-family='system-ui, sans-serif' font-size='12'"


def fate(record: Record) -> str:
    """What became of a faulty run."""
    if record["poisoned_steps"] or (record["curable"] and record["final_loss"] is None):
        return "poisoned"
    if record["error"]:
        return "stopped"
    if record["cured"] or (not record["curable"] and record["detected"] and record["remedy"] is not False):
        return "cured"
    return "went on" if record["detected"] else "unnoticed"


def svg(records: Sequence[Record]) -> str:
    """The picture; a cell is divided by the fates of its seeds."""
    faults = scored([r for r in records if r["kind"] == "faults"])
    sides = by_contender(sorted(faults, key=lambda r: (r["contender"] != OURS, r["contender"])))
    rows = sorted({(r["fault_class"], r["name"]) for side in sides.values() for r in side})
    width = _LEFT + len(sides) * (3 * _CELL + _GAP) + _RIGHT
    legend_top = _TOP + len(rows) * (_CELL + _GAP) + 24
    height = legend_top + 20 * len(FATES) + 10
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}'>",
        f"<rect width='{width}' height='{height}' fill='white'/>",
    ]
    for column, (contender, side) in enumerate(sides.items()):
        x = _LEFT + column * (3 * _CELL + _GAP)
        parts.append(_head(x, contender))
        for line, (_, name) in enumerate(rows):
            parts += _cell(x, _TOP + line * (_CELL + _GAP), [r for r in side if r["name"] == name])
    for line, (letter, name) in enumerate(rows):
        y = _TOP + line * (_CELL + _GAP) + 15
        parts.append(f"<text x='{_LEFT - 8}' y='{y}' text-anchor='end' {_FONT}>{escape(f'{letter}  {name}')}</text>")
    for line, (colour, says) in enumerate(FATES.values()):
        y = legend_top + 20 * line
        parts.append(f"<rect x='20' y='{y}' width='14' height='14' fill='{colour}'/>")
        parts.append(f"<text x='42' y='{y + 12}' {_FONT}>{escape(says)}</text>")
    return "\n".join([*parts, "</svg>"]) + "\n"


def _head(x: int, name: str) -> str:
    at = f"translate({x + 3 * _CELL // 2 + 4},{_TOP - 8}) rotate(-45)"
    return f"<text transform='{at}' {_FONT}>{escape(name)}</text>"


def _cell(x: int, y: int, runs: Sequence[dict[str, Any]]) -> list[str]:
    if not runs:
        return [f"<rect x='{x}' y='{y}' width='{3 * _CELL}' height='{_CELL}' fill='#eeeeee'/>"]
    share, parts, at = 3 * _CELL / len(runs), list[str](), float(x)
    counts = {name: sum(fate(r) == name for r in runs) for name in FATES}
    told = escape(", ".join(f"{count} {name}" for name, count in counts.items() if count))
    for name, count in counts.items():
        if count:
            wide = share * count
            rect = f"<rect x='{at:.1f}' y='{y}' width='{wide:.1f}' height='{_CELL}' fill='{FATES[name][0]}'>"
            parts.append(f"{rect}<title>{told}</title></rect>")
            at += wide
    return parts
