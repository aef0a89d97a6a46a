"""Findings about rows of a batch, told with the names of the rows and where in the step they stand.

A detector knows only numbers, a look only tensors; what a row is called, the port knows. Naming costs a pass over the
batch, so it is done for what was found and never for a healthy step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from finitune.core.types import Finding, RowId
from finitune.engine.port import Unit

_SHOWN = 3
_MAX_PLACES = 64
"""Places kept in a finding; its rows are all there."""


def with_rows(finding: Finding, units: Sequence[Unit], step: int | None = None) -> Finding:
    """The finding with these rows: ``rows``, ``data["places"]`` (row, micro, index, from 0), and in ``where``.

    Without any, it is as it was. ``step``: in which they stand, where that is not the one at hand.
    """
    return with_places(finding, [(step, unit) for unit in units])


def with_places(finding: Finding, found: Sequence[tuple[int | None, Unit]]) -> Finding:
    """The same for rows of several steps, each given with its step."""
    rows = tuple(dict.fromkeys(row for _, unit in found for row in unit.rows))
    if not rows:
        return finding
    places = [
        {"row": str(row), "micro": unit.micro, "index": unit.index, **({} if step is None else {"step": step})}
        for step, unit in found
        for row in unit.rows
    ]
    where = f"{finding.where}: {listed(rows)}" if finding.where else listed(rows)
    return replace(finding, where=where, rows=rows, data={**finding.data, "places": places[:_MAX_PLACES]})


def listed(rows: Sequence[RowId]) -> str:
    """The first few names, and how many more there are."""
    more = f" (+{len(rows) - _SHOWN})" if len(rows) > _SHOWN else ""
    return ", ".join(map(str, rows[:_SHOWN])) + more
