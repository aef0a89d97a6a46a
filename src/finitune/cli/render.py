"""Blocks of output: plain text for a pipe, rich for a terminal.

A command returns blocks and does not print them, so that the same command can answer in JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from finitune.report.words import aligned


@dataclass(frozen=True, slots=True)
class Heading:
    """A title."""

    text: str


@dataclass(frozen=True, slots=True)
class Raw:
    """Text shown exactly as it is."""

    text: str


@dataclass(frozen=True, slots=True)
class Para:
    """Running text, with an optional label before it."""

    text: str
    label: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells; ``head`` may be empty. Every row has as many cells as the first."""

    rows: tuple[tuple[str, ...], ...]
    head: tuple[str, ...] = ()


Block = Heading | Raw | Para | Table


def show(blocks: Sequence[Block], stream: TextIO) -> None:
    """Write blocks to ``stream``, in the manner of what is at its other end."""
    if not blocks:
        return
    if stream.isatty():
        _show_rich(blocks, stream)
    else:
        stream.write(plain(blocks))


def plain(blocks: Sequence[Block]) -> str:
    """Blocks as text without colour or wrapping; ends in a newline."""
    return "\n".join(_plain(block) for block in blocks).rstrip("\n") + "\n"


def _plain(block: Block) -> str:
    if isinstance(block, Table):
        return _plain_table(block)
    if isinstance(block, Para):
        return f"{block.label}: {block.text}" if block.label else block.text
    return block.text


def _plain_table(table: Table) -> str:
    return "\n".join(aligned(((table.head,) if table.head else ()) + table.rows))


def _show_rich(blocks: Sequence[Block], stream: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    # Text objects, not strings: what a user wrote is never read as markup. NO_COLOR is rich's own.
    console = Console(file=stream, highlight=False)
    for block in blocks:
        if isinstance(block, Table):
            table = RichTable(*block.head, box=box.SIMPLE_HEAD, show_header=bool(block.head), pad_edge=False)
            for row in block.rows:
                table.add_row(*(Text(cell) for cell in row))
            console.print(table)
        elif isinstance(block, Heading):
            console.print(Text(block.text, style="bold"))
        elif isinstance(block, Para) and block.label:
            console.print(Text.assemble((f"{block.label}: ", "cyan"), block.text))
        else:
            console.print(Text(block.text), soft_wrap=True)
