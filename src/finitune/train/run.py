"""A whole run: claim the folder, prepare, train, save, sum up.

run folder  claimed anew, or found with the checkpoint to go on from; its lock is held from then on
prepare     model, data, optimizer; every fault of the user surfaces here
Session     evaluate and sample, train (loop.py), evaluate, sample, save, summary
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from finitune.core import journal as journals
from finitune.core.files import sweep, write_atomic
from finitune.core.journal import Journal
from finitune.core.types import Finding
from finitune.train import checkpoint, folder, lock
from finitune.train.facts import facts_of, resolved
from finitune.train.finished import Finished, finished
from finitune.train.observer import Observers
from finitune.train.past import read_past, stored_recipe
from finitune.train.plan import Plan
from finitune.train.prepare import Prepared, prepare
from finitune.train.recipe import Recipe
from finitune.train.recipe_io import to_yaml
from finitune.train.replay import recall
from finitune.train.result import RunResult
from finitune.train.resume import Resumed, leave_behind, prepare_resumed
from finitune.train.session import Session, Start
from finitune.train.trackers_of import trackers_of


def plan_run(
    recipe: Recipe | None, *, resume: str | None = None, allow_changes: bool = False
) -> tuple[Plan | None, list[Finding]]:
    """What :func:`train_run` would do, without training and without writing anything.

    Arguments and errors as :func:`open_run`. There is no plan where a finished run leaves nothing to do.
    """
    if resume is None:
        assert recipe is not None, "a new run needs a recipe"
        prepared = prepare(recipe)
        return prepared.plan, prepared.findings
    place = folder.find_place(resume)
    folder.refuse_in_use(place.run_dir)
    recipe = recipe if recipe is not None else stored_recipe(place)
    done = finished(place, read_past(place.run_dir), recipe.max_steps, ())
    if done is not None:
        return None, [done.finding]
    resumed = prepare_resumed(place, recipe, allow_changes=allow_changes)
    plan = resumed.prepared.plan
    done = finished(place, resumed.past, plan.total_steps, ())
    return (None, [done.finding]) if done is not None else (plan, resumed.prepared.findings)


def train_run(
    recipe: Recipe | None,
    *,
    resume: str | None = None,
    allow_changes: bool = False,
    observers: Sequence[Any] = (),
    name: str = "run",
) -> RunResult:
    """Train to the end, to a stop request, or to a halt. Arguments and errors as :func:`open_run`."""
    opened = open_run(recipe, resume=resume, allow_changes=allow_changes, observers=observers, name=name)
    if isinstance(opened, Finished):
        return opened.run()
    try:
        return opened.run()
    finally:
        opened.start.close()


def open_run(
    recipe: Recipe | None,
    *,
    resume: str | None = None,
    allow_changes: bool = False,
    observers: Sequence[Any] = (),
    name: str = "run",
) -> Session | Finished:
    """A run that is ready to start; ``run()`` it once.

    Args:
        recipe: what to do; None together with ``resume`` takes the recipe stored with the run.
        resume: a run folder, one of its checkpoints, or "latest".
        allow_changes: go on also where the recipe, the data or the device are not those of before; see
            :mod:`finitune.train.changes`.
        observers: see :mod:`finitune.train.observer`.
        name: stem of an ``auto`` output folder.

    Raises:
        UserError, UserErrors: the recipe, model, data or folder cannot be used, or the run cannot go on as it was;
            nothing was started and nothing was changed.
    """
    started_s = time.perf_counter()
    if resume is not None:
        return _go_on(recipe, resume, allow_changes, observers, started_s)
    assert recipe is not None, "a new run needs a recipe"
    run_dir = folder.choose(recipe.output_dir, name)
    folder.claim(run_dir, overwrite=recipe.overwrite_output_dir)
    with ExitStack() as stack:
        stack.callback(_remove_if_empty, run_dir)
        release = stack.callback(lock.hold(run_dir))
        sweep(run_dir)
        prepared = prepare(recipe)
        start = Start(started_s, facts=facts_of(recipe, prepared), close=release)
        session = _session(run_dir, prepared, observers, start)
        stack.pop_all()
    return session


def _go_on(
    recipe: Recipe | None, resume: str, allow_changes: bool, observers: Sequence[Any], started_s: float
) -> Session | Finished:
    """A run that is taken up again. Raises as :func:`open_run`, with the folder as it was."""
    place = folder.find_place(resume)
    recipe = recipe if recipe is not None else stored_recipe(place)
    done = finished(place, read_past(place.run_dir), recipe.max_steps, observers)
    if done is not None:
        return done
    with ExitStack() as stack:
        release = stack.callback(lock.hold(place.run_dir))
        # First: of an interrupted swap the sweep puts the old checkpoint back.
        swept = sweep(place.run_dir)
        for folder_of_checkpoint in checkpoint.listed(place.run_dir):
            swept += sweep(folder_of_checkpoint)
        for folder_of_incident in sorted((place.run_dir / "incidents").glob("[0-9]*")):
            swept += sweep(folder_of_incident)
        resumed = prepare_resumed(place, recipe, allow_changes=allow_changes)
        # The length of a recipe in epochs is known only now, and the sweep may have put the result back.
        done = finished(place, resumed.past, resumed.prepared.plan.total_steps, observers)
        if done is not None:
            return done
        start = Start(started_s, True, resumed.point.folder, facts=resumed.facts, close=release)
        session = _session(place.run_dir, resumed.prepared, observers, start, resumed)
        port = resumed.prepared.port
        recall(port.seen, port.parts.loader, port.state.step, port.state.cursor, journals.read(session.journal.path))
        if swept:
            session.journal.write("swept", done=swept)
        stack.pop_all()
    return session


def _session(
    run_dir: Path, prepared: Prepared, observers: Sequence[Any], start: Start, resumed: Resumed | None = None
) -> Session:
    """The session, with the folder made ready for it. Raises UserError SYS004 where the disk refuses."""
    stored = to_yaml(resolved(prepared.recipe, prepared)).encode()
    path, journal = run_dir / folder.RECIPE_FILE, None
    try:
        if resumed is None or not path.is_file() or path.read_bytes() != stored:
            write_atomic(path, stored)
        journal = Journal(run_dir / folder.JOURNAL_FILE)
        if resumed is not None:
            leave_behind(resumed, journal)
        everyone = Observers([*observers, *trackers_of(prepared.recipe.report_to, run_dir)])
    except OSError as error:
        if journal is not None:
            journal.abandon()
        raise folder.unusable(run_dir, error) from error
    return Session(run_dir, prepared, journal, everyone, start)


def _remove_if_empty(run_dir: Path) -> None:
    """Leave no empty folder behind when a run could not start."""
    try:
        run_dir.rmdir()
    except OSError:
        return
