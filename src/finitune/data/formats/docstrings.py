"""Docstrings: a question about an object of a library, answered by its documentation.

What it sees:
    Rows with ``object``, ``kind`` (module, class or function) and ``docstring``, as the built-in source
    ``finitune:stdlib`` makes them from the installed interpreter: data for a first run, without a download.

Why it is bad:
    A docstring of nothing but a signature or white space answers no question.

Example:
    ``{"object": "math.hypot", "kind": "function", "docstring": "Multidimensional Euclidean distance ..."}``

What to do:
    Nothing: such rows are left out and counted.

Source:
    https://docs.python.org/3/library/inspect.html#inspect.cleandoc, PEP 257
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from finitune.data.fields import question_and_answer, text_of, total
from finitune.data.records import Example, Row

COLUMNS = "object, docstring [, kind]"

_QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "module": (
        "What is the Python module `{0}` for?",
        "Describe the standard library module `{0}`.",
        "When would I import `{0}` in Python?",
    ),
    "class": (
        "What is `{0}` in Python?",
        "Describe the class `{0}`.",
        "What does the Python class `{0}` represent?",
    ),
    "function": (
        "What does `{0}` do in Python?",
        "Explain `{0}` in Python.",
        "How does `{0}` behave?",
        "What is `{0}` for?",
    ),
}
_ROLE = re.compile(r":(?:[a-z]+:)?[a-z]+:`([^`]*)`")  # Sphinx roles: :class:`X` -> `X`
_ENOUGH_CHARS = 240
_AT_MOST_CHARS = 480
_MAX_PARAGRAPHS = 3


def sniff(fields: Mapping[str, Any]) -> float:
    """Confidence 0..1 that the row is of this format."""
    return 1.0 if isinstance(fields.get("docstring"), str) and isinstance(fields.get("object"), str) else 0.0


@total
def to_messages(row: Row) -> Example:
    """The row as a question and its answer, or what is wrong with it."""
    _, name = text_of(row, ("object",), "docstrings")
    field, doc = text_of(row, ("docstring",), "docstrings")
    kind = row.fields.get("kind")
    phrasings = _QUESTIONS[kind if isinstance(kind, str) and kind in _QUESTIONS else "function"]
    # Chosen by the row's content, so that the same row asks the same question everywhere.
    phrasing = phrasings[int(row.id.digest, 16) % len(phrasings)]
    return question_and_answer(row, ("object", phrasing.format(name)), (field, clean(doc)))


def clean(doc: str) -> str:
    """The first paragraphs, until they say enough; markup roles removed, lines of prose joined."""
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n", doc.strip()):
        said_enough = len(kept) == _MAX_PARAGRAPHS or sum(map(len, kept)) >= _ENOUGH_CHARS
        too_much = kept and sum(map(len, kept)) + len(paragraph) > _AT_MOST_CHARS
        if said_enough or too_much or (kept and ">>>" in paragraph):
            break
        kept.append(_ROLE.sub(r"`\1`", _reflowed(paragraph)))
    return "\n\n".join(p for p in kept if p)


def _reflowed(paragraph: str) -> str:
    """Prose on one line; an indented block (a table, code) or an example as it is."""
    lines = paragraph.strip("\n").splitlines()
    if ">>>" in paragraph or any(line[:1].isspace() for line in lines[1:]):
        return "\n".join(line.rstrip() for line in lines)
    return " ".join(line.strip() for line in lines)
