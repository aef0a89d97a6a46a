"""The list of runs, and which of them a word on the command line means."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from finitune.cli.codes import BAD_USAGE
from finitune.cli.render import Block, Heading, Raw
from finitune.cli.runs_words import (
    ago,
    clean,
    loss_change,
    resume_blocks,
    shell_word,
    size_text,
    state_word,
    steps_text,
    terminal_columns,
)
from finitune.cli.session import Outcome
from finitune.core.errors import UserError
from finitune.core.messages.catalogue import text
from finitune.core.units import number_text
from finitune.report.words import aligned, width
from finitune.train.codes_runs import FOLDER_UNREADABLE, NO_RUN_THERE
from finitune.train.folder import RUNS
from finitune.train.runs import Run, is_run, listed, step_in

_COLUMNS = ("name", "state", "step", "loss", "eval", "checkpoints", "trusted", "size", "changed")
_PARTS_A_LINE = 3


def list_runs(path: str | None, refused: Sequence[str] = ()) -> Outcome:
    """The runs in a folder, or in runs/. Raises UserError, also for options that need one run (``refused``)."""
    folder = Path(RUNS if path is None else os.path.expanduser(path))
    found = _found(folder, chosen=path is not None)
    for option in refused:
        problem = text("runs.needs_one", option=option, path=clean(str(folder)), count=len(found))
        raise UserError(BAD_USAGE, option, problem=problem, command="finitune runs")
    return Outcome(list_blocks(folder, found), {"dir": str(folder), "runs": [run.to_json() for run in found]})


def run_meant(name: str | None) -> Path | None:
    """The one run that is meant: its folder, one of its checkpoints, or "latest"; None where a list is meant.

    Raises UserError SYS031 where "latest" means nothing.
    """
    if name is None:
        return Path(RUNS) if is_run(Path(RUNS)) else None
    path = Path(os.path.expanduser(name))
    if is_run(path):
        return path
    if step_in(path.name) is not None and is_run(path.parent):
        return path.parent
    if name == "latest" and not os.path.lexists(path):
        found = _found(Path(RUNS), chosen=False)
        if not found:
            raise UserError(NO_RUN_THERE, name, path=name, reason=text("runs.no_runs_yet", path=f"{RUNS}/"))
        return found[0].path
    return None


def _found(folder: Path, *, chosen: bool) -> list[Run]:
    """The runs in a folder. A folder that the user named must be there, and hold runs or nothing at all.

    Raises UserError: SYS031, or SYS032 where it cannot be listed.
    """
    shown = clean(str(folder))
    try:
        if not chosen and not os.path.lexists(folder):
            return []
        found = listed(folder)
        if not found and chosen and os.listdir(folder):
            raise UserError(NO_RUN_THERE, shown, path=shown, reason=text("runs.holds_none"))
    except (FileNotFoundError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(NO_RUN_THERE, shown, path=shown, reason=text("runs.no_such_path")) from error
    except NotADirectoryError as error:
        raise UserError(NO_RUN_THERE, shown, path=shown, reason=text("runs.is_file")) from error
    except OSError as error:
        raise UserError(FOLDER_UNREADABLE, shown, path=shown, error=error.strerror or str(error)) from error
    return found


def list_blocks(folder: Path, found: Sequence[Run]) -> tuple[Block, ...]:
    """The list as a table, or (narrow terminal) as a few lines a run; then what to do next."""
    shown = clean(f"{folder}{os.sep}")
    if not found:
        return (Raw(text("runs.none", path=shown)),)
    blocks: list[Block] = [Heading(text("runs.heading", path=shown, count=len(found))), Raw("")]
    blocks += _table(found) or [block for run in found for block in _lines(run)]
    blocks += _notes(found)
    blocks += resume_blocks(found)
    blocks += [Raw(""), Raw(text("runs.more", run=shell_word(found[0].path)))]
    return tuple(blocks)


def _cells(run: Run) -> tuple[str, ...]:
    count = len(run.checkpoints)
    newest = run.checkpoints[0].step if run.checkpoints else 0
    return (
        clean(run.path.name),
        state_word(run),
        steps_text(run),
        number_text(run.loss),
        loss_change(run.eval_first, run.eval_last),
        text("runs.checkpoints", count=count, step=newest) if count else "-",
        str(sum(c.trusted for c in run.checkpoints)) if count else "-",
        size_text(run.num_bytes),
        ago(run.changed_s),
    )


def _table(found: Sequence[Run]) -> list[Block]:
    """One line a run; empty where the terminal is too narrow for that."""
    head, *lines = aligned([tuple(text(f"runs.head.{name}") for name in _COLUMNS), *map(_cells, found)])
    if max(map(width, (head, *lines))) > terminal_columns():
        return []
    return [Heading(head), *map(Raw, lines)]


def _lines(run: Run) -> tuple[Block, ...]:
    """One run in two or three lines, without what is not known."""
    name, state, *values, changed = _cells(run)
    parts = [text(f"runs.part.{n}", value=v) for n, v in zip(_COLUMNS[2:-1], values, strict=True) if v != "-"]
    parts.append(changed)
    first = len(parts) if len(parts) <= _PARTS_A_LINE + 1 else _PARTS_A_LINE
    rows = [Raw(f"    {'   '.join(row)}") for row in (parts[:first], parts[first:]) if row]
    return (Heading(f"{name}  {state}"), *rows)


def _notes(found: Sequence[Run]) -> list[Block]:
    """What is wrong with some of the runs."""
    notes: list[Block] = []
    for run in found:
        name = clean(run.path.name)
        if run.reason:
            notes.append(Raw(text("runs.note.unreadable", name=name, reason=clean(run.reason))))
        if run.has_lost_checkpoints:
            notes.append(Raw(text("runs.note.lost", name=name)))
        if run.num_damaged_lines:
            facts = {"name": name, "count": run.num_damaged_lines, "run": shell_word(run.path)}
            notes.append(Raw(text("runs.note.damaged", **facts)))
    return [Raw(""), *notes] if notes else []
