"""What every command shares: the options of the whole program, and the answer of a command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finitune.cli.render import Block
from finitune.core.errors import Exit


@dataclass(frozen=True, slots=True)
class Session:
    """The options that may stand anywhere on the command line."""

    lang: str | None = None
    json: bool = False
    debug: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer of a command: blocks for a reader, ``payload`` (JSON-able) for a program."""

    blocks: tuple[Block, ...] = ()
    payload: Mapping[str, Any] = field(default_factory=dict)
    exit_code: int = Exit.GOOD
    errors: tuple[Mapping[str, Any], ...] = ()
    """Faults that were told already, for the JSON object."""


class Answered(Exception):
    """Leaves the parser early with an answer (``--help``, ``--version``)."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        super().__init__("answered")


def peek(arguments: Sequence[str]) -> Session:
    """The shared options, read before the parser is built.

    The language must be known before help texts are made, and ``--json`` before a fault of the
    parser itself is told. The parser knows these options too and refuses wrong uses of them.
    """
    before = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    lang = None
    for index, this in enumerate(before):
        if this == "--lang":
            lang = "".join(before[index + 1 : index + 2])
        elif this.startswith("--lang="):
            lang = this.partition("=")[2]
    return Session(lang or None, "--json" in before, "--debug" in before)
