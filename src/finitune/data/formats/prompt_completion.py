"""Prompt and completion: one question, one answer, under the names people use.

What it sees:
    Rows with ``prompt``/``question``/``query``/``problem`` and ``completion``/``response``/``answer``/``chosen``/
    ``solution``. Both may also be lists of turns. Of a preference pair the ``chosen`` answer is trained and
    ``rejected`` is not read.

Why it is bad:
    A row with an empty answer trains the model to stop at once; one with an empty prompt teaches it to talk unasked.

Example:
    ``{"question": "What is 6 * 7?", "answer": "42"}``

What to do:
    Fill in the empty field or remove the row. With a chat tokenizer the pair becomes a user and an assistant
    turn; ``data.template: raw`` joins the two texts as they are and adds the end token.

Source:
    https://huggingface.co/docs/trl/dataset_formats (prompt-completion, preference),
    https://github.com/openai/grade-school-math (question/answer)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finitune.data.fields import (
    BadRow,
    check_answers,
    first_present,
    optional_text,
    question_and_answer,
    refuse_media,
    text_of,
    tools_of,
    total,
)
from finitune.data.formats.messages import read_turns
from finitune.data.records import Example, Message, Row, row_finding
from finitune.data.rowcodes import MISSING_FIELD

COLUMNS = "prompt (or question, query, problem) and completion (or response, answer, chosen, solution)"
_PROMPT = ("prompt", "question", "query", "problem")
_ANSWER = ("completion", "response", "answer", "chosen", "solution")


def sniff(fields: Mapping[str, Any]) -> float:
    """Confidence 0..1 that the row is of this format."""
    prompt, answer = first_present(fields, _PROMPT), first_present(fields, _ANSWER)
    if prompt is None or answer is None:
        return 0.0
    return 0.9 if isinstance(fields[prompt], (str, list)) and isinstance(fields[answer], (str, list)) else 0.2


@total
def to_messages(row: Row) -> Example:
    """The row as a conversation, or what is wrong with it."""
    prompt, answer = first_present(row.fields, _PROMPT), first_present(row.fields, _ANSWER)
    if _is_turns(row, prompt) or _is_turns(row, answer):
        return _from_turns(row, prompt, answer)
    question = text_of(row, _PROMPT, "prompt_completion")
    reply = text_of(row, _ANSWER, "prompt_completion")
    return question_and_answer(row, question, reply, optional_text(row, ("system",)))


def _is_turns(row: Row, field: str | None) -> bool:
    value = row.fields[field] if field is not None else None
    return isinstance(value, list) and bool(value) and all(isinstance(t, Mapping) and "type" not in t for t in value)


def _from_turns(row: Row, prompt: str | None, answer: str | None) -> Example:
    """Lists of turns on one side or both. A preference answer may repeat the prompt's turns."""
    for field, names in ((prompt, _PROMPT), (answer, _ANSWER)):
        if field is None:
            columns, needed = ", ".join(row.fields), names[0]
            raise BadRow(row_finding(MISSING_FIELD, row.id, needed, columns=columns, format="prompt_completion"))
    refuse_media(row)
    head = _turns(row, str(prompt), "user")
    tail = _turns(row, str(answer), "assistant")
    if len(tail) > len(head) and tail[: len(head)] == head:
        tail = tail[len(head) :]
    context = [Message(m.role, m.content, False, m.tool_calls) for m in head]
    check_answers(row, str(answer), tail)
    return Example(row.id, (*context, *tail), tools=tools_of(row))


def _turns(row: Row, field: str, role: str) -> list[Message]:
    if _is_turns(row, field):
        return read_turns(row, field, row.fields[field])
    return [Message(role, text_of(row, (field,), "prompt_completion")[1])]
