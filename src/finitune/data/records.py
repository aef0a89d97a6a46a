"""The values of the data floor: a raw row, a conversation, a tokenised row.

``Row`` -> (format) -> ``Example`` -> (chat template, tokenizer) -> ``Encoded``. The RowId goes with each of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from finitune.core.codes import Code
from finitune.core.types import Finding, RowId

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


def row_finding(code: Code, row: RowId, field: str = "", **data: Any) -> Finding:
    """A Finding about one row, naming file, row and (where one is to blame) field."""
    where = f"{row.source}:{row.row}" + (f" field {field!r}" if field else "")
    return code.find(where, rows=(row,), file=row.source, row=row.row, field=field, **data)
