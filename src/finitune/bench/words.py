"""What became of a case in one line, for the command and for the casebook. From its record alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finitune.core.messages.catalogue import text


def line(record: Mapping[str, Any]) -> str:
    """The line of any record, in the language in force."""
    if "defect" in record:
        return text("bench.case.defect", reason=record["defect"])
    if "skipped" in record:
        return text("bench.case.skipped", reason=record["skipped"])
    if record["kind"] == "overhead":
        return text("bench.case.overhead", ratio=record["ratio"])
    if record["kind"] == "controls":
        return text("bench.case.control", **{k: record[k] for k in ("steps", "findings", "interventions")})
    return text(
        "bench.case.fault",
        detected=text("bench.yes" if record["detected"] else "bench.no"),
        cause=f"{', '.join(record['cause_said']) or '-'} ({record['cause'] or '-'})",
        remedy=", ".join(record["remedy_said"]),
        percent=_percent(record),
    )


def _percent(record: Mapping[str, Any]) -> str:
    if not record["curable"]:
        return text("bench.not_scored")
    return text("bench.not_finite") if record["percent"] is None else f"{record['percent']:+.2f} %"
