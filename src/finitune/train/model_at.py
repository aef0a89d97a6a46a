"""The model of a stored run as it was after any of its steps: a checkpoint or the start, and redo by the journal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from finitune.core import journal
from finitune.core.errors import UserError
from finitune.core.types import Finding
from finitune.engine.codes_time import STEP_UNREACHABLE
from finitune.engine.line import line_of
from finitune.engine.snapshot import SnapshotRing
from finitune.engine.timeline import Arrival, Base, Timeline, Unreachable
from finitune.numerics.seeds import generators_kept
from finitune.train import checkpoint
from finitune.train.folder import JOURNAL_FILE, find_place
from finitune.train.origin import Origin
from finitune.train.past import stored_recipe
from finitune.train.prepare import Prepared, prepare


@dataclass(frozen=True, slots=True)
class ModelAt:
    """A run brought to one of its steps; its folder is as it was."""

    prepared: Prepared
    arrival: Arrival


def model_at(run: str, step: int) -> ModelAt:
    """The run's model, optimizer and statistics after ``step`` batches, bit for bit, and how they were reached.

    Raises:
        UserError: no such run (SYS005), a step that the journal does not know or no base to start from (SYS012), a
            step that does not come out as it did (NUM120), or whatever preparing the stored recipe finds.
    """
    place = find_place(run)
    path = place.run_dir / JOURNAL_FILE
    recipe = stored_recipe(place)
    prepared = prepare(recipe, looked_at=False)

    def stored() -> Iterator[Base]:
        rollbacks = line_of(journal.read(path)).rollbacks
        yield from checkpoint.bases(place.run_dir, rollbacks, prepared.port.parts)
        yield Origin(recipe)

    timeline = Timeline(prepared.port, lambda: journal.read(path), SnapshotRing(0), stored, journal=str(path))
    try:
        with generators_kept(), prepared.port.parts.kernels:
            return ModelAt(prepared, timeline.go_to(step))
    except Unreachable as fault:
        raise as_error(fault.finding) from fault
    except OSError as error:
        reason = STEP_UNREACHABLE.find("", step=step, reason=str(error), journal=str(path))
        raise as_error(reason) from error


def as_error(finding: Finding) -> UserError:
    """The finding as an error of what the user asked for."""
    from finitune.core.codes import all_codes

    return UserError(all_codes()[finding.code], finding.where or "--step", **finding.data)
