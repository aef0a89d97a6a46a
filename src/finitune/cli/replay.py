"""``finitune replay CAPSULE``: the failing step of an incident once more, anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from finitune.cli.render import Block, Heading, Raw
from finitune.cli.session import Outcome
from finitune.core.messages.catalogue import text

if TYPE_CHECKING:
    from finitune.engine.capsule_replay import Replayed

_PRECISIONS = ("fp32", "bf16")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("replay", help=text("incidents.replay_help"))(replay)


def _known_precision(value: str | None) -> str | None:
    if value is not None and value not in _PRECISIONS:
        raise typer.BadParameter(text("incidents.bad_precision", value=repr(value)))
    return value


# The annotations are read when the command is built: the language is known then.
def replay(
    path: Annotated[str, typer.Argument(metavar="CAPSULE", help=text("incidents.help.capsule"))],
    experiment: Annotated[
        str | None,
        typer.Option("--experiment", metavar="NAME", help=text("incidents.help.experiment"), show_default=False),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            metavar="fp32|bf16",
            help=text("incidents.help.precision"),
            show_default=False,
            callback=_known_precision,
        ),
    ] = None,
) -> Outcome:
    """Replay, and say what came of it."""
    from finitune.core.errors import Exit, UserError
    from finitune.engine.capsule_replay import Replay
    from finitune.engine.codes_incident import CANNOT_REPLAY
    from finitune.report.incident_words import clean
    from finitune.train.replay_capsule import replay_capsule

    done = replay_capsule(path, experiment=experiment, precision=precision)
    if done.verdict is Replay.IMPOSSIBLE:
        _tell_of_script(path, experiment, precision)
        raise UserError(CANNOT_REPLAY, clean(path), reason=clean(done.reason))
    return Outcome(_blocks(done), {"replay": done.to_json()}, Exit.FINDINGS if done.fails else Exit.GOOD)


def _tell_of_script(path: str, experiment: str | None, precision: str | None) -> None:
    """Raise UserError SYS424, with the lines to be written, where the capsule comes from a script."""
    from finitune.adapters.codes_script import SCRIPT_CAPSULE
    from finitune.core.errors import UserError
    from finitune.engine.capsule_read import read_capsule
    from finitune.report.incident_words import clean

    capsule = read_capsule(path)
    if capsule.kind == "script":
        given = {"experiment": experiment, "precision": precision}
        options = "".join(f", {name}={value!r}" for name, value in given.items() if value is not None)
        shown = clean(path)
        raise UserError(SCRIPT_CAPSULE, shown, path=shown, step=capsule.step, quoted=repr(shown), options=options)


def _blocks(done: Replayed) -> tuple[Block, ...]:
    from finitune.report.incident_words import clean

    verdict = text(f"incidents.replay.{done.verdict.value}")
    blocks: list[Block] = [
        Heading(text("incidents.replay.heading", number=done.number, step=done.step, verdict=verdict)),
        Raw(f"  {text('incidents.replay.recorded', **(done.recorded or {}))}"),
        Raw(f"  {text('incidents.replay.now', **(done.now or {}))}"),
    ]
    if done.said:
        blocks.append(Raw(f"  {clean(done.said)}"))
    blocks += [Raw(f"  {text('incidents.replay.note', note=clean(note))}") for note in done.notes]
    return tuple(blocks)
