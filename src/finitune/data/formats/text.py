"""Plain text: documents for language modelling, every token trained.

What it sees:
    Rows with ``text`` (or ``content``, ``document``), and the lines of .txt files.

Why it is bad:
    An empty document has no token to train on.

Example:
    ``{"text": "Call me Ishmael. Some years ago ..."}``

What to do:
    Remove empty documents. A document longer than max_length is cut into pieces, none of it is lost.

Source:
    https://huggingface.co/docs/trl/dataset_formats (language modeling)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finitune.data.fields import BadRow, refuse_media, text_of, total
from finitune.data.records import Example, Row, row_finding
from finitune.data.rowcodes import EMPTY_PROMPT

COLUMNS = "text (or content, document)"
_TEXT = ("text", "content", "document")


def sniff(fields: Mapping[str, Any]) -> float:
    """Confidence 0..1 that the row is of this format."""
    if isinstance(fields.get("text"), str):
        return 0.8
    return 0.5 if any(isinstance(fields.get(name), str) for name in _TEXT) else 0.0


@total
def to_messages(row: Row) -> Example:
    """The row as a document, or what is wrong with it."""
    refuse_media(row)
    field, text = text_of(row, _TEXT, "text")
    if not text.strip():
        raise BadRow(row_finding(EMPTY_PROMPT, row.id, field))
    return Example(row.id, text=text)
