"""The update to look at: that of the failing step, or, where it makes none, the newest one that was committed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from finitune.core.incident import Trigger
from finitune.engine.case import Case
from finitune.engine.conditions import NotPossible
from finitune.engine.lab import Lab
from finitune.engine.look.codes_update import LOSS_RESCALED
from finitune.engine.prove import is_at_hand
from finitune.engine.snapshot import Snapshot

_OWN = (Trigger.UPDATE, Trigger.OUTLIER)
"""The failing step has finite loss and gradients, and its batch is at hand: its own update can be made."""
_MAX_BACK = 4


@contextmanager
def standing_before_it(lab: Lab, case: Case) -> Iterator[None]:
    """Inside, the port stands before that update, its batch at the cursor; afterwards as before the failing step.

    A step that was committed when the failure was seen (RUNAWAY, SILENT) leaves a bare loop without a batch at hand,
    and one whose loss or gradients are not finite makes no update. Raises NotPossible, BudgetSpent.
    """
    with lab.standing_at(_start(lab, case)):
        yield


def of_the_loss(case: Case) -> bool:
    """A silent fault of the loss function's own: no update has a part in it."""
    return case.trigger is Trigger.SILENT and case.finding.code == LOSS_RESCALED.code


def _start(lab: Lab, case: Case) -> Snapshot:
    if case.trigger in _OWN:
        return lab.before
    found = _before_the_last_update(lab)
    if found is not None:
        return found
    if case.trigger in (Trigger.RUNAWAY, Trigger.SILENT) and is_at_hand(lab.port):
        return lab.before
    raise NotPossible("no state from before the last update can be had")


def _before_the_last_update(lab: Lab) -> Snapshot | None:
    """The newest state from which the next batch was committed; batches that were given up lie behind it."""
    for back in range(1, min(_MAX_BACK, lab.before.step) + 1):
        lab.budget.charge(1.0)
        state = lab.state_at(lab.before.step - back)
        if state is None:
            return None
        if state.record.get("updates", 0) < lab.before.record.get("updates", 1):
            return state
    return None
