"""``finitune incidents [RUN] [NUMBER]``: what failed in a run, why, and what was done about it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finitune.cli.render import Block, Heading, Raw
from finitune.cli.session import Outcome
from finitune.core.messages.catalogue import text

if TYPE_CHECKING:
    from finitune.core.incident import Incident
    from finitune.report.run_incidents import Incidents


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("incidents", help=text("incidents.help"))(incidents)


# The annotations are read when the command is built: the language is known then.
def incidents(
    run: Annotated[str, typer.Argument(metavar="RUN|latest", help=text("incidents.help.run"))] = "latest",
    number: Annotated[
        int | None, typer.Argument(metavar="NUMBER", help=text("incidents.help.number"), show_default=False)
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help=text("incidents.help.markdown"))] = False,
) -> Outcome:
    """The list, or one incident."""
    from finitune.cli.runs_words import clean
    from finitune.core.errors import UserError
    from finitune.report.run_incidents import incidents_of
    from finitune.train.codes_runs import FOLDER_UNREADABLE

    run_dir = _run_dir(run)
    try:
        found = incidents_of(run_dir)
    except OSError as error:
        shown = clean(str(run_dir))
        raise UserError(FOLDER_UNREADABLE, shown, path=shown, error=error.strerror or str(error)) from error
    if number is None:
        return _list(run_dir, found)
    return _one(run_dir, _chosen(run_dir, found, number), found, markdown=markdown)


def _run_dir(name: str) -> Path:
    """The run that is meant. Raises UserError SYS031."""
    from finitune.cli.runs_list import run_meant
    from finitune.cli.runs_words import clean
    from finitune.core.errors import UserError
    from finitune.train.codes_runs import NO_RUN_THERE

    run_dir = run_meant(name)
    if run_dir is None:
        shown = clean(name)
        raise UserError(NO_RUN_THERE, shown, path=shown, reason=text("runs.holds_none"))
    return run_dir


def _chosen(run_dir: Path, found: Incidents, number: int) -> Incident:
    """The incident of this number. Raises UserError SYS417."""
    from finitune.cli.runs_words import clean
    from finitune.core.errors import UserError
    from finitune.engine.codes_incident import NO_SUCH_INCIDENT

    chosen = next((i for i in found.found if i.number == number), None)
    if chosen is None:
        known = ", ".join(str(i.number) for i in found.found) or text("incidents.list.no_numbers")
        shown = clean(str(run_dir))
        raise UserError(NO_SUCH_INCIDENT, shown, path=shown, number=number, known=known)
    return chosen


def _list(run_dir: Path, found: Incidents) -> Outcome:
    from finitune.cli.runs_words import clean, shell_word
    from finitune.core.errors import Exit
    from finitune.report.incident import table

    shown = clean(str(run_dir))
    blocks: list[Block] = [Raw(text("incidents.list.none", path=shown))]
    if found.found:
        head, *lines = table(found.found)
        blocks = [Heading(text("incidents.list.heading", path=shown, count=len(found.found))), Raw("")]
        blocks += [Heading(head), *map(Raw, lines)]
        blocks += [Raw(""), Raw(text("incidents.list.more", path=shell_word(run_dir)))]
    blocks += _damage(found)
    payload = {"run": str(run_dir), "incidents": [i.to_json() for i in found.found], "damage": list(found.damage)}
    settled = not found.unsettled and not found.damage
    return Outcome(tuple(blocks), payload, Exit.GOOD if settled else Exit.FINDINGS)


def _one(run_dir: Path, incident: Incident, found: Incidents, *, markdown: bool) -> Outcome:
    from finitune.cli.runs_words import shell_word
    from finitune.core.errors import Exit
    from finitune.report.incident import summary, to_markdown
    from finitune.report.run_incidents import Incidents

    run = shell_word(run_dir)
    lines = summary(incident, run)
    blocks: list[Block] = [Heading(lines[0]), *map(Raw, lines[1:]), *_damage(found)]
    if markdown:
        blocks = [Raw(to_markdown(incident, run))]
    payload = {"run": str(run_dir), "incident": incident.to_json(), "summary": list(lines)}
    unsettled = Incidents((incident,), ()).unsettled
    return Outcome(tuple(blocks), payload, Exit.FINDINGS if unsettled else Exit.GOOD)


def _damage(found: Incidents) -> list[Block]:
    if not found.damage:
        return []
    from finitune.cli.runs_words import clean

    first = clean(found.damage[0])
    return [Raw(""), Raw(text("incidents.list.damaged", count=len(found.damage), first=first))]
