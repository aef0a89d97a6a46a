"""Reading fields of raw rows without ever raising to the caller: what all formats share.

Inside a format a fault travels as ``BadRow``; the ``total`` decorator turns it into the Finding that
``to_messages`` returns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

from finitune.core.types import Finding
from finitune.data.files import shorten
from finitune.data.records import Example, Message, Row, row_finding, type_name
from finitune.data.rowcodes import BAD_TEXT, EMPTY_ANSWER, EMPTY_PROMPT, MEDIA, MISSING_FIELD, NO_ANSWER, WRONG_TYPE

_SURROGATE = re.compile("[\ud800-\udfff]")
_MEDIA_FIELDS = ("images", "image", "videos", "video", "audios", "audio")


class BadRow(Exception):
    """A fault of one row on its way out of a format."""

    def __init__(self, finding: Finding) -> None:
        self.finding = finding
        super().__init__(finding.code)


def total(read: Callable[[Row], Example]) -> Callable[[Row], Example | Finding]:
    """Make a reader total: a ``BadRow`` becomes its Finding."""

    @wraps(read)
    def to_messages(row: Row) -> Example | Finding:
        try:
            return read(row)
        except BadRow as bad:
            return bad.finding

    return to_messages


def first_present(fields: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of ``names`` that the row has with a value other than null."""
    return next((n for n in names if fields.get(n) is not None), None)


def text_of(row: Row, names: Sequence[str], format_name: str) -> tuple[str, str]:
    """(field name, text) of the first of ``names`` that the row has."""
    name = first_present(row.fields, names)
    if name is None:
        columns = shorten([str(k) for k in row.fields])
        raise BadRow(row_finding(MISSING_FIELD, row.id, names[0], columns=columns, format=format_name))
    return name, as_text(row, name, row.fields[name])


def optional_text(row: Row, names: Sequence[str]) -> str:
    """Like :func:`text_of`, but "" where the row has none of the fields."""
    name = first_present(row.fields, names)
    return "" if name is None else as_text(row, name, row.fields[name])


def as_text(row: Row, field: str, value: Any) -> str:
    """A text, or a list of text parts joined.

    Parts are OpenAI's ``{"type": "text", "text": ...}`` (also with ``value``). A part of the type
    "reasoning" is put in a think block as reasoning models write it; a "tool_call" part is its JSON.
    """
    if isinstance(value, list):
        return "".join(_part_text(row, field, part) for part in value)
    if not isinstance(value, str):
        raise BadRow(row_finding(WRONG_TYPE, row.id, field, found=type_name(value), expected="a string"))
    half = _SURROGATE.search(value)
    if half:
        codepoint = f"{ord(half.group()):04X}"
        raise BadRow(row_finding(BAD_TEXT, row.id, field, codepoint=codepoint, column=half.start() + 1))
    return value


def _part_text(row: Row, field: str, part: Any) -> str:
    if isinstance(part, str):
        return as_text(row, field, part)
    if not isinstance(part, Mapping):
        raise BadRow(row_finding(WRONG_TYPE, row.id, field, found=type_name(part), expected="a text part"))
    kind = part.get("type", "text")
    inner = part.get("text", part.get("value", part.get("content")))
    if kind == "reasoning":
        return think_block(as_text(row, field, inner))
    if kind not in ("text", "input_text", "output_text", "tool_call"):
        raise BadRow(row_finding(MEDIA, row.id, field, kind=str(kind)[:40]))
    return as_text(row, field, inner)


def think_block(reasoning: str) -> str:
    """Reasoning as Qwen3, DeepSeek-R1 and InternLM3 write it before an answer."""
    return f"<think>\n{reasoning.strip()}\n</think>\n\n" if reasoning.strip() else ""


def refuse_media(row: Row) -> None:
    """A row whose images or sound would be lost is not trained as text alone."""
    for name in _MEDIA_FIELDS:
        if row.fields.get(name):
            raise BadRow(row_finding(MEDIA, row.id, name, kind=name))


def parsed_json(row: Row, field: str, value: Any) -> Any:
    """A value that may be given as JSON text (``tools``, ``arguments``)."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRow(row_finding(WRONG_TYPE, row.id, field, found="broken JSON", expected="JSON")) from None


def tools_of(row: Row) -> tuple[Mapping[str, Any], ...]:
    """Tool schemas in OpenAI's shape ``{"type": "function", "function": {...}}``; bare functions are wrapped."""
    value = row.fields.get("tools")
    if not value:
        return ()
    tools = parsed_json(row, "tools", value)
    if not isinstance(tools, list) or not all(isinstance(t, Mapping) for t in tools):
        raise BadRow(row_finding(WRONG_TYPE, row.id, "tools", found=type_name(tools), expected="a list of objects"))
    return tuple(t if "function" in t else {"type": "function", "function": t} for t in tools)


def question_and_answer(row: Row, prompt: tuple[str, str], answer: tuple[str, str], system: str = "") -> Example:
    """A single-turn conversation from (field, text) pairs; neither may be empty."""
    refuse_media(row)
    if not prompt[1].strip():
        raise BadRow(row_finding(EMPTY_PROMPT, row.id, prompt[0]))
    if not answer[1].strip():
        raise BadRow(row_finding(EMPTY_ANSWER, row.id, answer[0]))
    head = (Message("system", system),) if system.strip() else ()
    messages = (*head, Message("user", prompt[1]), Message("assistant", answer[1]))
    return Example(row.id, messages, tools=tools_of(row))


def check_answers(row: Row, field: str, messages: Sequence[Message]) -> None:
    """A conversation needs a supervised answer, and none of them may be empty."""
    supervised = [(i, m) for i, m in enumerate(messages) if m.is_supervised()]
    if not supervised:
        raise BadRow(row_finding(NO_ANSWER, row.id, field))
    for number, message in supervised:
        if not message.content.strip() and not message.tool_calls:
            raise BadRow(row_finding(EMPTY_ANSWER, row.id, f"{field}[{number}]"))
