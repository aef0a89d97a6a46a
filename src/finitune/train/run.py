"""A whole run: claim the folder, prepare, train, save, sum up.

run folder  claimed anew, or found with the checkpoint to go on from
prepare     model, data, optimizer; every fault of the user surfaces here
Session     evaluate and sample, train (loop.py), evaluate, sample, save, summary
"""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finitune.core.errors import UserError, UserErrors
from finitune.core.files import write_atomic
from finitune.core.journal import Journal
from finitune.core.types import Finding
from finitune.engine.codes import RESUME_IMPOSSIBLE
from finitune.train import checkpoint, folder
from finitune.train.observer import Observers
from finitune.train.plan import Plan
from finitune.train.prepare import Prepared, prepare
from finitune.train.recipe import Recipe
from finitune.train.recipe_io import load_recipe, to_yaml
from finitune.train.result import RunResult
from finitune.train.session import Session, Start
from finitune.train.trackers_of import trackers_of


def plan_run(recipe: Recipe) -> tuple[Plan, list[Finding]]:
    """What :func:`train_run` would do, without training."""
    prepared = prepare(recipe)
    return prepared.plan, prepared.findings


def train_run(
    recipe: Recipe | None, *, resume: str | None = None, observers: Sequence[Any] = (), name: str = "run"
) -> RunResult:
    """Train to the end, to a stop request, or to a halt. Arguments and errors as :func:`open_run`."""
    return open_run(recipe, resume=resume, observers=observers, name=name).run()


def open_run(
    recipe: Recipe | None, *, resume: str | None = None, observers: Sequence[Any] = (), name: str = "run"
) -> Session:
    """A run that is ready to start; ``run()`` it once.

    Args:
        recipe: what to do; None together with ``resume`` takes the recipe stored with the run.
        resume: a run folder, one of its checkpoints, or "latest".
        observers: see :mod:`finitune.train.observer`.
        name: stem of an ``auto`` output folder.

    Raises:
        UserError, UserErrors: the recipe, model, data or folder cannot be used; nothing was started.
    """
    started_s = time.perf_counter()
    run_dir, recipe, point, findings = _place(recipe, resume, name)
    try:
        prepared = prepare(recipe, point)
    except (UserError, UserErrors):
        if resume is None:
            _remove_if_empty(run_dir)
        raise
    prepared.findings[:0] = findings
    if point is not None:
        _restore(prepared, point)
    if point is None:
        stored = to_yaml(resolved(recipe, prepared))
        write_atomic(run_dir / folder.RECIPE_FILE, stored.encode())
    journal = Journal(run_dir / folder.JOURNAL_FILE)
    everyone = Observers([*observers, *trackers_of(recipe.report_to, run_dir)])
    return Session(run_dir, prepared, journal, everyone, Start(started_s, resume is not None, point))


def _place(recipe: Recipe | None, resume: str | None, name: str) -> tuple[Path, Recipe, Path | None, list[Finding]]:
    """The run's folder, its recipe, and the checkpoint to go on from."""
    if resume is None:
        assert recipe is not None, "a new run needs a recipe"
        run_dir = folder.choose(recipe.output_dir, name)
        folder.claim(run_dir, overwrite=recipe.overwrite_output_dir)
        return run_dir, recipe, None, []
    run_dir = folder.find_run(resume)
    point, findings = checkpoint.newest_good(run_dir)
    if point is None:
        raise UserError(RESUME_IMPOSSIBLE, "--resume", path=str(run_dir), reason="no intact checkpoint is left")
    stored = recipe if recipe is not None else load_recipe(str(run_dir / folder.RECIPE_FILE), [])
    return run_dir, stored, point, findings


def _remove_if_empty(run_dir: Path) -> None:
    """Leave no empty folder behind when a run could not start."""
    try:
        run_dir.rmdir()
    except OSError:
        return


def resolved(recipe: Recipe, prepared: Prepared) -> Recipe:
    """The recipe with everything that was derived written out, so that it runs the same again from anywhere."""
    data, model = recipe.data, recipe.model
    return recipe.model_copy(
        update={
            "precision": prepared.precision,
            "fp16": None,
            "bf16": None,
            "device": str(prepared.device),
            "max_steps": prepared.plan.total_steps,
            "data": data.model_copy(
                update={"train": _absolute(data.train), "eval": None if data.eval is None else _absolute(data.eval)}
            ),
            "model": model.model_copy(
                update={"name_or_path": _absolute(model.name_or_path), "chat_template": _absolute(model.chat_template)}
            ),
        }
    )


def _absolute(paths: Any) -> Any:
    """Paths that exist as absolute ones; names of models and sources, and templates, as they are."""
    if isinstance(paths, list):
        return [_absolute(path) for path in paths]
    if not isinstance(paths, str):
        return paths
    pattern = any(c in paths for c in "*?[")
    return os.path.abspath(paths) if os.path.exists(paths) or (pattern and glob.glob(paths)) else paths


def _restore(prepared: Prepared, point: Path) -> None:
    """Moments and state of a checkpoint. Raises UserError where it belongs to another recipe."""
    try:
        checkpoint.load(prepared.port, point)
    except (KeyError, ValueError, OSError) as error:
        reason = f"its state does not fit this recipe ({error!r})"
        raise UserError(RESUME_IMPOSSIBLE, "--resume", path=str(point), reason=reason) from error
