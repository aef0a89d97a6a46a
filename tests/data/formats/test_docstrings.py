"""Questions about library objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finitune.core.types import RowId
from finitune.data.formats.docstrings import clean, to_messages
from finitune.data.records import Example, Row

DOC = """Return the sum.

    The start value is added :func:`first`
    and the rest follows.

    >>> total([1])
    1
    """


def test_prose_is_joined_roles_are_stripped_examples_end_it() -> None:
    text = DOC.replace("    ", "")
    assert clean(text) == "Return the sum.\n\nThe start value is added `first` and the rest follows."


def test_indented_blocks_keep_their_lines() -> None:
    assert clean("Modes are:\n  r  read\n  w  write") == "Modes are:\n  r  read\n  w  write"


def test_long_documentation_ends_after_it_said_enough() -> None:
    first = "a" * 300
    assert clean(f"{first}\n\nmore") == first


def test_an_example_alone_is_kept() -> None:
    assert clean(">>> 1 + 1\n2") == ">>> 1 + 1\n2"


def test_the_phrasing_depends_on_the_content_alone() -> None:
    fields = {"object": "math.pi", "kind": "function", "docstring": "The number pi."}
    asked = []
    for number in range(40):
        example = to_messages(Row(RowId("s", 1, f"{number:012x}"), fields))
        assert isinstance(example, Example)
        again = to_messages(Row(RowId("elsewhere", 9, f"{number:012x}"), fields))
        assert isinstance(again, Example)
        assert again.messages == example.messages
        asked.append(example.messages[0].content)
    assert all("`math.pi`" in q for q in asked)
    assert len(set(asked)) == 4


def test_an_empty_docstring_is_a_finding(fault: Callable[..., Any]) -> None:
    assert fault("docstrings", {"object": "x", "docstring": " \n "}) == ("DAT035", "docstring")
