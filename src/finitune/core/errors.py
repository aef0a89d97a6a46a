"""Errors that teach: what, where, why, what to try, with the numbers in them.

Every error a user can cause is a :class:`UserError` built from a :class:`~finitune.core.codes.Code`;
the command line turns it into one message and exit code 2. Several faults are raised together as
:class:`UserErrors`, so that a user repairs them in one go.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

from finitune.core.codes import Code, fill, shorten
from finitune.core.messages.catalogue import language, text
from finitune.core.types import Finding


class Exit(IntEnum):
    """Exit codes of the command line."""

    GOOD = 0
    FINDINGS = 1
    USAGE = 2
    HALTED = 3
    INTERNAL = 4


class FiniTuneError(Exception):
    """Root of all errors raised on purpose."""

    exit_code = Exit.INTERNAL


class UserError(FiniTuneError):
    """One fault the user can mend: a code, where it is, and its numbers."""

    exit_code = Exit.USAGE

    def __init__(self, code: Code, where: str = "", **data: Any) -> None:
        self.code = code
        self.where = where
        self.data = data
        super().__init__(self.code.code)

    def finding(self) -> Finding:
        """The same fault as a value."""
        return self.code.find(self.where, **self.data)

    def __str__(self) -> str:
        return describe(self.code, self.where, self.data)


class UserErrors(FiniTuneError):
    """All faults found at once. Never empty."""

    exit_code = Exit.USAGE

    def __init__(self, errors: Sequence[UserError]) -> None:
        if not errors:
            raise ValueError("UserErrors needs at least one error")
        self.errors = tuple(errors)
        super().__init__(", ".join(e.code.code for e in errors))

    def __str__(self) -> str:
        return "\n\n".join(str(e) for e in self.errors)


class Halted(FiniTuneError):
    """The guard stopped the run; the last good state stands."""

    exit_code = Exit.HALTED

    def __init__(self, code: Code, where: str = "", **data: Any) -> None:
        self.code = code
        self.where = where
        self.data = data
        super().__init__(code.code)

    def __str__(self) -> str:
        return describe(self.code, self.where, self.data)


def raise_all(errors: Sequence[UserError]) -> None:
    """Raise what was collected: nothing, the one error, or all of them together."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise UserErrors(errors)


def describe(code: Code, where: str, data: dict[str, Any] | Any) -> str:
    """What, where, why, what to try, in the current language.

    A cure that names a number which is absent from ``data`` is shown with its name in braces.
    """
    page = code.text(language())
    lines = [f"{code.code} {fill(page.what, data)}"]
    if where:
        lines.append(f"  {text('error.where')}: {shorten(where)}")
    if page.why:
        lines.append(f"  {text('error.why')}: {fill(page.why, data)}")
    lines += [f"  {text('error.try')}: {fill(cure, data)}" for cure in page.cures]
    return "\n".join(lines)
