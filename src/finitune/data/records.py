"""The values of the data floor: a raw row, a conversation, a tokenised row.

``Row`` -> (format) -> ``Example`` -> (chat template, tokenizer) -> ``Encoded``. The RowId goes with each of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from finitune.core.codes import Code
from finitune.core.types import Finding, RowId

if TYPE_CHECKING:  # the formats, and with them all codes, load without numpy
    import numpy as np

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. ``supervised=None`` means the default: assistant turns only."""

    role: str
    """One of ``ROLES``."""
    content: str
    supervised: bool | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """Calls an assistant turn makes, as ``{"name": ..., "arguments": ...}``."""

    def is_supervised(self) -> bool:
        """Whether the loss falls on this turn."""
        return self.role == "assistant" if self.supervised is None else self.supervised


@dataclass(frozen=True, slots=True)
class Row:
    """One raw row of a source."""

    id: RowId
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """A row that a format has understood: a conversation, or (``text`` set) a plain document."""

    id: RowId
    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of the tools the conversation may call."""


def with_system(example: Example, prompt: str | None) -> Example:
    """The conversation with ``prompt`` as its system turn, where it has none of its own."""
    if prompt is None or not example.messages or any(m.role == "system" for m in example.messages):
        return example
    return replace(example, messages=(Message("system", prompt), *example.messages))


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tokenised row."""

    id: RowId
    ids: np.ndarray
    """int32, 1-D: token ids."""
    supervised: np.ndarray
    """bool, as long as ``ids``: True where the token is a loss *target*. Never True at position 0."""
    chunk: int = 0
    """Which piece of a long document this is (0 for the first and for all conversations)."""

    def __len__(self) -> int:
        return len(self.ids)


def canonical_bytes(value: Any) -> bytes:
    """The bytes a row is named by: compact JSON with sorted keys, so that layout and key order do not matter.

    Lone surrogates (legal in JSON escapes, illegal in UTF-8) are kept, values JSON lacks (dates) are shown as text.
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return text.encode("utf-8", "surrogatepass")


def type_name(value: Any) -> str:
    """The JSON name of a value's type."""
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "a string", list: "a list", dict: "an object", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def row_finding(code: Code, row: RowId, field: str = "", **data: Any) -> Finding:
    """A Finding about one row, naming file, row and (where one is to blame) field."""
    where = f"{row.source}:{row.row}" + (f" field {field!r}" if field else "")
    return code.find(where, rows=(row,), file=row.source, row=row.row, field=field, **data)
