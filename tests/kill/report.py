"""The table of the matrix: configuration, kind, trials, and what came of them."""

from __future__ import annotations

import datetime
import os
import platform
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

from kill.trials import Outcome

OUTCOMES: list[Outcome] = []
"""Of this session, in the order they were done."""
_INTRODUCTION = (
    "Every trial is a run of a tiny model that is killed, stopped, or let down by its disk or its files, and resumed "
    "until it finishes. *Bit-equal*: every journalled step and state digest, the trained weights, and the weights, "
    "moments and state of the last checkpoint are those of the run that nobody touched. *Unreadable checkpoints*: "
    "folders with the name of a checkpoint that do not agree with their manifest, looked for after every process. "
    "*Left behind*: trials after which half-written files were still there."
)
_HEAD = (
    "configuration",
    "kind",
    "trials",
    "processes",
    "died",
    "place not met",
    "bit-equal",
    "unreadable checkpoints",
    "left behind",
)


def rows() -> list[tuple[str, ...]]:
    """One row a configuration and kind, and a last one for all."""
    grouped: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for outcome in OUTCOMES:
        grouped[outcome.trial.configuration, outcome.trial.kind].append(outcome)
    found = [_row(*key, outcomes) for key, outcomes in sorted(grouped.items())]
    return [*found, _row("all", "", OUTCOMES)]


def _row(configuration: str, kind: str, outcomes: list[Outcome]) -> tuple[str, ...]:
    replies = [reply for o in outcomes for reply in o.replies]
    numbers = (
        len(outcomes),
        len(replies),
        sum(bool(reply["died"]) for reply in replies),
        sum(o.missed for o in outcomes),
        sum(not o.faults for o in outcomes),
        sum(len(o.unreadable) for o in outcomes),
        sum(bool(o.leftovers) for o in outcomes),
    )
    return (configuration, kind, *map(str, numbers))


def as_markdown(time_s: float) -> str:
    """The whole report."""
    today = datetime.datetime.now(datetime.timezone.utc).date()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "safetensors"))
    lines = [
        "# Kill matrix",
        "",
        _INTRODUCTION,
        "",
        f"{today}, {platform.system()}, {os.cpu_count()} cores, Python {platform.python_version()}, {packages}; "
        f"{time_s / 60:.0f} minutes. `FINITUNE_KILL=all python -m pytest tests/kill`.",
        "",
        "| " + " | ".join(_HEAD) + " |",
        "|" + "---|" * len(_HEAD),
    ]
    lines += ["| " + " | ".join(row) + " |" for row in rows()]
    return "\n".join(lines) + "\n"


def keep(path: Path, time_s: float) -> None:
    """Write the report."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_markdown(time_s), encoding="utf-8")
