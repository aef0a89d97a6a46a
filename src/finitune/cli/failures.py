"""From an exception to what is told of it: message, JSON records, exit code."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finitune.cli.session import Session
from finitune.core.errors import Exit, FiniTuneError, Halted, UserError, UserErrors
from finitune.core.messages.catalogue import text


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a command has no outcome."""

    exit_code: int
    message: str
    errors: tuple[Mapping[str, Any], ...]


def failure_of(error: Exception, session: Session) -> Failure:
    """What to tell of an error; one nobody foresaw leaves its traceback in a file."""
    if session.debug:
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, UserErrors):
        return Failure(Exit.USAGE, str(error), tuple(_record(e) for e in error.errors))
    if isinstance(error, (UserError, Halted)):
        return Failure(error.exit_code, str(error), (_record(error),))
    if isinstance(error, FiniTuneError):
        return Failure(error.exit_code, str(error), ({"code": "INTERNAL", "where": "", "message": str(error)},))
    return _internal(error)


def _record(error: UserError | Halted) -> Mapping[str, Any]:
    return {"code": error.code.code, "where": error.where, "message": str(error), "data": error.data}


def _internal(error: Exception) -> Failure:
    name, problem = type(error).__name__, " ".join(str(error).split())[:200]
    path = _write_traceback(error)
    message = text("cli.internal", name=name, problem=problem, path=path)
    record = {
        "code": "INTERNAL",
        "where": path,
        "message": message,
        "data": {"type": name, "problem": problem, "traceback": path},
    }
    return Failure(Exit.INTERNAL, message, (record,))


def _write_traceback(error: Exception) -> str:
    """Path of a new file with the traceback; "-" where none can be written (then it goes to stderr)."""
    lines = "".join(traceback.format_exception(error))
    try:
        handle, path = tempfile.mkstemp(prefix="finitune-error-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(lines)
    except OSError:
        sys.stderr.write(lines)
        return "-"
    return path
