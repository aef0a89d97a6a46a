"""Blocks as plain text and on a terminal."""

from __future__ import annotations

import io

import pytest

from finitune.cli.render import Heading, Para, Raw, Table, plain, show
from finitune.report.words import width


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


BLOCKS = (
    Heading("Title"),
    Para("a [bold]user[/bold] text", "label"),
    Table((("a", "1"), ("bb", "22"))),
    Raw("raw [x]"),
)


def test_a_pipe_gets_plain_text():
    assert plain(BLOCKS) == "Title\nlabel: a [bold]user[/bold] text\na   1\nbb  22\nraw [x]\n"
    pipe = io.StringIO()
    show(BLOCKS, pipe)
    assert pipe.getvalue() == plain(BLOCKS)


def test_columns_line_up_in_chinese():
    assert width("错误ab") == 6
    lines = plain((Table((("错误", "x"), ("abcd", "y"), ("a", "z")), ("名", "值")),)).splitlines()
    assert lines == ["名    值", "错误  x", "abcd  y", "a     z"]


def test_an_empty_table_is_no_error():
    assert plain((Table(()),)) == "\n"


@pytest.mark.parametrize("no_color", [True, False])
def test_a_terminal_gets_style_and_never_reads_markup(monkeypatch, no_color):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("NO_COLOR", "1") if no_color else monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    show(BLOCKS, terminal)
    assert "[bold]user[/bold]" in terminal.getvalue()
    assert "raw [x]" in terminal.getvalue()
    assert ("\x1b[36m" in terminal.getvalue()) == (not no_color)


def test_nothing_is_written_for_no_blocks():
    pipe = io.StringIO()
    show((), pipe)
    assert pipe.getvalue() == ""
