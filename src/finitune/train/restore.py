"""The state of a checkpoint into a prepared run, and everything that may be wrong with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError

from finitune.core.errors import FiniTuneError, UserError
from finitune.core.messages.catalogue import text
from finitune.data.loader import Cursor
from finitune.engine.codes import RESUME_IMPOSSIBLE
from finitune.engine.conditions import NotPossible
from finitune.train import checkpoint
from finitune.train.past import Facts, fact
from finitune.train.prepare import Prepared, shape_of
from finitune.train.recipe import Recipe
from finitune.train.schedule import SCHEDULES

FOREIGN = (
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    OverflowError,
    RecursionError,
    OSError,
    SafetensorError,
)
"""What reading a state that another program wrote, or that nobody finished, may raise."""
_SLOTS = {"sgd": {"momentum_buffer"}}
_ADAM_SLOTS = {"exp_avg", "exp_avg_sq", "step"}


class OtherState(Exception):
    """A checkpoint whose files agree with its manifest does not hold the state that it was written from."""


def restore(prepared: Prepared, folder: Path, step: int, moved: Facts | None = None) -> None:
    """Moments, cursor, statistics and counters of a verified checkpoint; the weights came with the model.

    Args:
        prepared: the run, with the weights of the checkpoint.
        folder: the checkpoint.
        step: the step it was written at, by its manifest.
        moved: the facts of before, where rows or their grouping may have changed since: the place in the data is
            then kept as a share of the epoch.

    Raises:
        UserError: SYS005 where the state is not one of this run.
        OtherState: its digest is not that of the state the checkpoint was written from (not asked with ``moved``).
    """
    port = prepared.port
    try:
        checkpoint.load(port, folder)
        other = checkpoint.other_than_written(folder, port) if moved is None else None
        if other is not None:
            raise OtherState(text("resume.no.other_state", where=other))
        if moved is not None:
            port.state.cursor = _moved(prepared, moved)
        problem = next(_faults(prepared, step), None)
    except NotPossible as error:
        problem = str(error)
    except FOREIGN as error:
        problem = repr(error)
    if problem is not None:
        reason = text("resume.no.state", problem=problem)
        raise UserError(RESUME_IMPOSSIBLE, "--resume", path=str(folder), reason=reason)
    _in_the_weights_format(prepared)


def _moved(prepared: Prepared, before: Facts) -> Cursor:
    """The cursor at the same share of its epoch; past the end of it, the start of the next one."""
    cursor, loader = prepared.port.state.cursor, prepared.port.parts.loader
    batches, was = loader.steps_per_epoch(cursor.epoch), fact(before, "data.steps_per_epoch")
    step = cursor.step
    if isinstance(was, int) and was > 0 and was != loader.steps_per_epoch(0):
        step = cursor.step * batches // was
    return Cursor(cursor.epoch, step) if step < batches else Cursor(cursor.epoch + 1, 0)


def _faults(prepared: Prepared, step: int) -> Iterator[str]:
    """What is wrong with the state that was loaded. Digests cannot tell: they are those of what was written."""
    state, loader = prepared.port.state, prepared.port.parts.loader
    if state.step != step:
        yield text("resume.no.other_step", found=state.step, step=step)
    counters = {"updates": state.updates, "attempt": state.attempt, "loss_sum": state.loss_sum}
    counters |= {"cursor.epoch": state.cursor.epoch, "cursor.step": state.cursor.step}
    for name, found in counters.items():
        if not math.isfinite(found) or (found < 0 and name != "loss_sum"):
            yield text("resume.no.counter", name=name, found=found)
    batches = loader.steps_per_epoch(state.cursor.epoch)
    if state.cursor.step >= batches:
        yield text("resume.no.place", epoch=state.cursor.epoch, batch=state.cursor.step + 1, batches=batches)
    yield from _moment_faults(prepared)


def _moment_faults(prepared: Prepared) -> Iterator[str]:
    """A parameter has all the moments that its optimizer keeps, or none yet; anything else fails in the next step."""
    parts = prepared.port.parts
    expected = _SLOTS.get(parts.optim_settings.name, _ADAM_SLOTS)
    trained = prepared.port.state.updates > 0 and bool(expected)
    if trained and not any(parts.optimizer.state.get(p) for _, p in parts.parameters):
        # Nothing would fail: the optimizer would begin anew, with the steps of a beginning.
        yield text("resume.no.moments", name=parts.parameters[0][0], found="-", expected=", ".join(sorted(expected)))
    for name, parameter in parts.parameters:
        found = set(parts.optimizer.state.get(parameter, {}))
        if found and found != expected:
            yield text(
                "resume.no.moments", name=name, found=", ".join(sorted(found)), expected=", ".join(sorted(expected))
            )


def _in_the_weights_format(prepared: Prepared) -> None:
    """Moments in the number format of their weights, which a change of precision may have changed."""
    optimizer = prepared.port.parts.optimizer
    for _, parameter in prepared.port.parts.parameters:
        slots = optimizer.state.get(parameter, {})
        for slot, value in list(slots.items()):
            if value.dim() and value.dtype != parameter.dtype:
                slots[slot] = value.to(parameter.dtype)


def rate_under(recipe: Any, total_steps: int, updates: int) -> float | None:
    """The learning rate after ``updates`` committed steps of a stored recipe; None where it is no recipe of ours."""
    try:
        then = Recipe.model_validate(recipe)
    except (ValidationError, FiniTuneError):
        return None
    return then.learning_rate * SCHEDULES[then.lr_scheduler_type](shape_of(then, total_steps))(updates)
