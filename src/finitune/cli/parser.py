"""The parser: typer's, with options shared by every command and help in the reader's language.

Help texts in the command files are keys of the catalogue; they are translated here, once the
language is known.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer
import typer.core

from finitune.cli.codes import BAD_USAGE
from finitune.cli.render import Raw
from finitune.cli.session import Answered, Outcome
from finitune.core.errors import Exit, UserError
from finitune.core.messages.catalogue import LANGUAGES, text

# Some versions of typer carry their own click, others use the installed one: the parent of
# BadParameter is the UsageError of whichever is in use.
UsageFault: Any = typer.BadParameter.__bases__[0]

_HEADINGS = re.compile(r"^(Usage|Options|Arguments|Commands):", re.MULTILINE)


def build_parser(app: typer.Typer, order: Sequence[str]) -> Any:
    """The command of ``app``, with shared options on it and on everything below it, listed in ``order``."""
    app.callback(invoke_without_command=True, help="cli.help")(_root)
    parser: Any = typer.main.get_command(app)
    # typer lists groups after plain commands.
    parser.commands = {name: parser.commands[name] for name in order}
    shared = _shared_options()
    for command in _all_commands(parser):
        # click's own help option speaks English only.
        command.add_help_option = False
        command.params.extend(shared)
        command.help = _translated(command.help)
        command.short_help = None
        for param in command.params:
            # Arguments of click itself have no help; typer's have.
            param.help = _translated(param.help)
    return parser


def usage_error(fault: Any) -> UserError:
    """A fault of the parser as an error with a code."""
    command = fault.ctx.command_path if fault.ctx is not None else "finitune"
    return UserError(BAD_USAGE, command, problem=fault.format_message(), command=command)


def _root(
    ctx: typer.Context,
    _version: Annotated[
        bool,
        typer.Option("--version", help="cli.option.version", is_eager=True, expose_value=False, callback=_show_version),
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        page = _help_page(ctx)
        raise Answered(Outcome((Raw(page),), {"help": page}, Exit.USAGE))


def _help_page(ctx: Any) -> str:
    return _HEADINGS.sub(lambda match: text(f"cli.heading.{match[1]}"), ctx.get_help())


def _show_help(ctx: typer.Context, wanted: bool) -> None:
    if wanted:
        page = _help_page(ctx)
        raise Answered(Outcome((Raw(page),), {"help": page}))


def _show_version(wanted: bool) -> None:
    if wanted:
        from finitune.cli.version import version

        raise Answered(version())


def _known_language(name: str | None) -> str | None:
    if name is not None and name not in LANGUAGES:
        raise typer.BadParameter(f"{name!r}: {', '.join(LANGUAGES)}")
    return name


def _declare(
    lang: Annotated[
        str | None,
        typer.Option("--lang", metavar="en|zh", help="cli.option.lang", expose_value=False, callback=_known_language),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="cli.option.json", expose_value=False)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="cli.option.debug", expose_value=False)] = False,
    show_help: Annotated[
        bool,
        typer.Option("--help", "-h", help="cli.option.help", is_eager=True, expose_value=False, callback=_show_help),
    ] = False,
) -> None:
    """Only a place to declare the shared options; ``session.peek`` reads them."""


def _shared_options() -> list[Any]:
    app = typer.Typer(add_completion=False)
    app.command(add_help_option=False)(_declare)
    params: list[Any] = typer.main.get_command(app).params
    return params


def _all_commands(command: Any) -> Iterator[Any]:
    yield command
    if isinstance(command, typer.core.TyperGroup):
        for inner in command.commands.values():
            yield from _all_commands(inner)


def _translated(key: str | None) -> str | None:
    return text(key) if key and key.startswith("cli.") else key
