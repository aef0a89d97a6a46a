"""Conversations: OpenAI messages, ShareGPT conversations, XTuner conversations, dialogs.

What it sees:
    Rows with a list of turns under ``messages``, ``conversations``, ``conversation``, ``dialogs`` or ``dialog``.
    A turn is ``{"role", "content"}`` (OpenAI), ``{"from", "value"}`` (ShareGPT) or ``{"input", "output"}``
    (XTuner). Names of speakers are unified: human, gpt, bot, model, function_call, observation, ... Extras:
    ``tools``, ``system``, ``tool_calls``, ``reasoning_content``, and ``weight``/``train`` of a turn (0 or false:
    shown, not trained). A preference row's ``chosen`` turn ends the conversation. Turns of the role
    "pretrain" are a plain document.

Why it is bad:
    An unknown speaker, an empty answer or a picture that is not shown would be trained as if nothing were amiss.

Example:
    ``{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}``

What to do:
    Mend the turn that the finding names; its number counts from 0.

Source:
    https://platform.openai.com/docs/guides/supervised-fine-tuning,
    https://github.com/lm-sys/FastChat (ShareGPT), https://github.com/InternLM/xtuner (0.2 data formats)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finitune.data.fields import (
    BadRow,
    as_text,
    check_answers,
    first_present,
    optional_text,
    parsed_json,
    refuse_media,
    think_block,
    tools_of,
    total,
)
from finitune.data.records import ROLES, Example, Message, Row, row_finding, type_name
from finitune.data.rowcodes import EMPTY_PROMPT, MISSING_FIELD, UNKNOWN_ROLE, WRONG_TYPE

COLUMNS = "messages (or conversations, conversation, dialogs): a list of turns with role and content"
_TURNS = ("messages", "conversations", "conversation", "dialogs", "dialog")
_SPEAKERS: Mapping[str, str] = {
    **{name: name for name in ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(
        ("gpt", "bot", "model", "chatgpt", "ai", "bing", "bard", "function_call", "tool_call"), "assistant"
    ),
    **dict.fromkeys(("observation", "function", "tool_response", "environment", "ipython"), "tool"),
    "developer": "system",
}
_CALLERS = ("function_call", "tool_call")


def sniff(fields: Mapping[str, Any]) -> float:
    """Confidence 0..1 that the row is of this format."""
    name = first_present(fields, _TURNS)
    if name is None or not isinstance(fields[name], list):
        return 0.0
    turns = fields[name]
    return 0.97 if turns and all(isinstance(t, Mapping) for t in turns) else 0.3


@total
def to_messages(row: Row) -> Example:
    """The row as a conversation, or what is wrong with it."""
    field = first_present(row.fields, _TURNS)
    if field is None:
        raise BadRow(row_finding(MISSING_FIELD, row.id, "messages", columns=", ".join(row.fields), format="messages"))
    refuse_media(row)
    turns = row.fields[field]
    if isinstance(turns, list) and turns and all(_speaker(t) == "pretrain" for t in turns):
        return _document(row, field, turns)
    messages = read_turns(row, field, turns)
    if isinstance(row.fields.get("chosen"), Mapping):
        messages += read_turns(row, "chosen", [row.fields["chosen"]])
    system = optional_text(row, ("system", "system_prompt"))
    if system.strip() and (not messages or messages[0].role != "system"):
        messages.insert(0, Message("system", system))
    check_answers(row, field, messages)
    return Example(row.id, tuple(messages), tools=tools_of(row))


def read_turns(row: Row, field: str, turns: Any) -> list[Message]:
    """Turns in any of the known spellings."""
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else type_name(turns)
        raise BadRow(row_finding(WRONG_TYPE, row.id, field, found=found, expected="a list of turns"))
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        where = f"{field}[{number}]"
        if not isinstance(turn, Mapping):
            raise BadRow(row_finding(WRONG_TYPE, row.id, where, found=type_name(turn), expected="an object"))
        messages += _pair(row, where, turn) if "output" in turn else [_message(row, where, turn)]
    return messages


def _speaker(turn: Any) -> Any:
    return turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None


def _message(row: Row, where: str, turn: Mapping[str, Any]) -> Message:
    speaker = _speaker(turn)
    role = _SPEAKERS.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        shown = speaker if isinstance(speaker, str) else type_name(speaker)
        known = ", ".join(ROLES)
        raise BadRow(row_finding(UNKNOWN_ROLE, row.id, f"{where}.role", role=str(shown)[:40], known=known))
    content = turn.get("content", turn.get("value"))
    calls = _calls(row, where, turn)
    if content is None and not calls:
        columns = ", ".join(str(k) for k in turn)
        raise BadRow(row_finding(MISSING_FIELD, row.id, f"{where}.content", columns=columns, format="messages"))
    if speaker in _CALLERS and not calls:
        return _call_turn(row, where, content)
    text = "" if content is None else as_text(row, where, content)
    reasoning = turn.get("reasoning_content")
    if isinstance(reasoning, str):
        text = think_block(as_text(row, where, reasoning)) + text
    return Message(role, text, _supervised(row, where, turn), calls)


def _supervised(row: Row, where: str, turn: Mapping[str, Any]) -> bool | None:
    """The turn's own wish: OpenAI's ``weight`` 0/1, ``train``; None where it has none."""
    name = first_present(turn, ("weight", "train"))
    if name is None:
        return None
    value = turn[name]
    if value not in (0, 1):
        raise BadRow(row_finding(WRONG_TYPE, row.id, f"{where}.{name}", found=str(value)[:40], expected="0 or 1"))
    return bool(value)


def _calls(row: Row, where: str, turn: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """OpenAI ``tool_calls`` as name and arguments."""
    calls = turn.get("tool_calls") or []
    if not isinstance(calls, list):
        raise BadRow(row_finding(WRONG_TYPE, row.id, f"{where}.tool_calls", found=type_name(calls), expected="a list"))
    return tuple(_call(row, where, call.get("function", call) if isinstance(call, Mapping) else call) for call in calls)


def _call(row: Row, where: str, call: Any) -> Mapping[str, Any]:
    name = call.get("name") if isinstance(call, Mapping) else None
    if not isinstance(name, str):
        expected = "an object with name and arguments"
        raise BadRow(row_finding(WRONG_TYPE, row.id, where, found=type_name(call), expected=expected))
    return {"name": name, "arguments": parsed_json(row, where, call.get("arguments") or {})}


def _call_turn(row: Row, where: str, content: Any) -> Message:
    """A ShareGPT ``function_call`` turn: its text is the JSON of one call or of a list of calls."""
    text = as_text(row, where, content)
    calls = parsed_json(row, where, text)
    calls = calls if isinstance(calls, list) else [calls]
    return Message("assistant", "", None, tuple(_call(row, where, call) for call in calls))


def _pair(row: Row, where: str, turn: Mapping[str, Any]) -> list[Message]:
    """XTuner 0.2: ``system``/``input``/``output`` in one turn; ``output_with_loss: false`` is shown only."""
    part = Row(row.id, turn)
    system = optional_text(part, ("system",))
    prompt = optional_text(part, ("input",))
    answer = as_text(row, f"{where}.output", turn["output"])
    trained = None if turn.get("output_with_loss", True) else False
    head = [Message("system", system)] if system.strip() else []
    question = [Message("user", prompt)] if prompt.strip() else []
    return [*head, *question, Message("assistant", answer, trained)]


def _document(row: Row, field: str, turns: list[Any]) -> Example:
    text = "".join(as_text(row, f"{field}[{i}]", t.get("content", t.get("value"))) for i, t in enumerate(turns))
    if not text.strip():
        raise BadRow(row_finding(EMPTY_PROMPT, row.id, field))
    return Example(row.id, text=text)
