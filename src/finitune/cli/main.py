"""The console script: build the parser, run one command, tell what came of it.

arguments -> peek (language, json) -> parser -> command -> Outcome -> stdout (text or one JSON object)
any error -> stderr (or the same JSON object) and its exit code

One command is one file of this package. The files import nothing heavy at their top, so that help
needs no torch; a command imports what it needs inside its function.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import typer

from finitune.cli.failures import Failure, failure_of
from finitune.cli.parser import UsageFault, build_parser, usage_error
from finitune.cli.render import Raw, show
from finitune.cli.session import Answered, Outcome, Session, peek
from finitune.core.errors import Exit
from finitune.core.messages.catalogue import set_language, text

COMMANDS = ("train", "runs", "incidents", "replay", "recipes", "chat", "export", "explain", "bench", "env", "version")
"""In the order of the help page; each is a module here with ``register(app)``."""

INTERRUPTED = 130
"""128 + SIGINT, as shells count."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code. Never raises for what a user can cause."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    session = peek(words)
    set_language(session.lang)
    _never_fail_to_print()
    try:
        answer = run(words, session)
        return _tell(answer, session)
    except BrokenPipeError:
        # The reader has left (`| head`); nothing more can be told, also not at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.GOOD
    finally:
        set_language(None)


def run(words: Sequence[str], session: Session) -> Outcome | Failure:
    """The command's outcome, or why there is none."""
    # With --json, stdout belongs to the one JSON object: anything else printed goes to stderr.
    aside = contextlib.redirect_stdout(sys.stderr) if session.json else contextlib.nullcontext()
    try:
        with aside:
            return _invoke(words, session)
    except Answered as answered:
        return answered.outcome
    except UsageFault as fault:
        return failure_of(usage_error(fault), session)
    except (KeyboardInterrupt, typer.Abort):
        return Failure(INTERRUPTED, text("cli.interrupted"), ({"code": "INTERRUPTED", "where": "", "data": {}},))
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001  (the last line of defence: exit code 4, never a traceback)
        return failure_of(error, session)


def _invoke(words: Sequence[str], session: Session) -> Outcome:
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    for name in COMMANDS:
        importlib.import_module(f"finitune.cli.{name}").register(app)
    result = build_parser(app, COMMANDS).main(
        args=list(words), prog_name="finitune", standalone_mode=False, obj=session
    )
    if isinstance(result, Outcome):
        return result
    return Outcome(exit_code=INTERRUPTED if result == INTERRUPTED else int(result or 0))


def _tell(answer: Outcome | Failure, session: Session) -> int:
    """Print the answer; the exit code."""
    payload = answer.payload if isinstance(answer, Outcome) else {}
    if session.json:
        print(_json(answer.exit_code, answer.errors, payload))
    elif isinstance(answer, Outcome):
        show(answer.blocks, sys.stdout)
    else:
        show((Raw(answer.message),), sys.stderr)
    sys.stdout.flush()
    return int(answer.exit_code)


def _json(exit_code: int, errors: Sequence[Mapping[str, Any]], payload: Mapping[str, Any]) -> str:
    import json

    from finitune.core.journal import encode

    record = {"ok": exit_code == Exit.GOOD, "exit_code": int(exit_code), "errors": errors, **payload}
    return json.dumps(encode(record), ensure_ascii=False, allow_nan=False)


def _never_fail_to_print() -> None:
    """A terminal that cannot show a character gets an escape instead of a crash."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
