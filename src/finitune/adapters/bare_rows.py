"""What was found in the batches of a bare loop, with the names of its rows: those of ``row_ids``, or content hashes.

Only what is found is named: a healthy step asks for no name. A batch that cannot be read any more (changed in place,
on a device that failed) leaves a finding without names, never a run without the finding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from finitune.adapters import bare_batch
from finitune.adapters.bare_held import Held, HeldBatches
from finitune.core.types import Finding
from finitune.engine.look.batch import rows_without_target
from finitune.engine.look.codes_step import EMPTY_ROWS
from finitune.engine.named_rows import with_places, with_rows
from finitune.engine.port import Unit


def named(findings: Sequence[Finding], held: HeldBatches) -> list[Finding]:
    """Findings of a look at the newest batch, with their rows."""
    return [_named(f, held) for f in findings]


def _named(finding: Finding, held: HeldBatches) -> Finding:
    if finding.rows:
        return finding
    if finding.code == EMPTY_ROWS.code:
        return with_places(finding, list(_without_target(held)))
    if held.newest not in held:
        return finding
    return with_rows(finding, units_at(held, held.at(held.newest), finding))


def units_at(held: HeldBatches, batch: Held, finding: Finding) -> list[Unit]:
    """The rows that a finding points at by ``micro`` and ``row_indices`` (from 0); none where it does not."""
    micro, indices = finding.data.get("micro"), finding.data.get("row_indices") or ()
    return _units(held, batch, micro, indices) if isinstance(micro, int) else []


def _units(held: HeldBatches, batch: Held, micro: int, indices: Sequence[int]) -> list[Unit]:
    if not indices:
        return []
    try:
        names = held.rows(batch)
    except Exception:  # noqa: BLE001 (row_ids may be any function, a device may have failed: names are a courtesy)
        return []
    rows = names[micro] if micro < len(names) else []
    return [Unit(micro, index, (rows[index],)) for index in indices if index < len(rows)]


def _without_target(held: HeldBatches) -> Iterator[tuple[int, Unit]]:
    """The rows without any target among the batches that are still held, oldest first."""
    for step in range(held.oldest, held.newest + 1):
        batch = held.at(step)
        for micro, nest in enumerate(batch.micros):
            tensors = [(n, t) for n, t in bare_batch.leaves(nest) if isinstance(t, Tensor)]
            empty_B = rows_without_target(tensors)
            indices = [] if empty_B is None else empty_B.nonzero().flatten().tolist()
            yield from ((step, unit) for unit in _units(held, batch, micro, indices))
