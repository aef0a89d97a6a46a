"""Alpaca: an instruction, an optional input, and the output.

What it sees:
    Rows with ``instruction`` and ``output`` (or ``response``); optional ``input`` (or ``context``), ``system``,
    ``history`` (earlier question/answer pairs) and ``tools``. The seed-task form with a list ``instances`` of
    input/output pairs is read too; each further pair becomes a further turn.

Why it is bad:
    A row without an output has nothing to train on, one with an empty output trains the model to stop at once.

Example:
    ``{"instruction": "Translate to French", "input": "cheese", "output": "fromage"}``

What to do:
    Fill in the empty field or remove the row. Instruction and input are joined by one newline.

Source:
    https://github.com/tatsu-lab/stanford_alpaca (data), https://github.com/yizhongw/self-instruct (seed tasks)
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
    question_and_answer,
    text_of,
    total,
)
from finitune.data.records import Example, Message, Row, row_finding, type_name
from finitune.data.rowcodes import EMPTY_PROMPT, WRONG_TYPE

COLUMNS = "instruction, output [, input, system, history]"
_INPUT = ("input", "context")
_OUTPUT = ("output", "response")


def sniff(fields: Mapping[str, Any]) -> float:
    """Confidence 0..1 that the row is of this format."""
    if "instruction" not in fields:
        return 0.0
    if first_present(fields, _OUTPUT):
        return 0.95
    return 0.9 if isinstance(fields.get("instances"), list) else 0.0


@total
def to_messages(row: Row) -> Example:
    """The row as a conversation, or what is wrong with it."""
    if "instances" in row.fields and first_present(row.fields, _OUTPUT) is None:
        return _from_instances(row)
    field, instruction = text_of(row, ("instruction",), "alpaca")
    answer = text_of(row, _OUTPUT, "alpaca")
    prompt = joined(instruction, optional_text(row, _INPUT))
    example = question_and_answer(row, (field, prompt), answer, optional_text(row, ("system",)))
    history = _history(row)
    if not history:
        return example
    at = 1 if example.messages[0].role == "system" else 0
    messages = (*example.messages[:at], *history, *example.messages[at:])
    check_answers(row, "history", messages)
    return Example(row.id, messages, tools=example.tools)


def joined(instruction: str, extra: str) -> str:
    """Instruction and input as one prompt."""
    return f"{instruction}\n{extra}" if extra.strip() else instruction


def _history(row: Row) -> tuple[Message, ...]:
    turns = row.fields.get("history") or []
    if not isinstance(turns, list) or not all(isinstance(t, list) and len(t) == 2 for t in turns):
        raise BadRow(row_finding(WRONG_TYPE, row.id, "history", found=type_name(turns), expected="a list of pairs"))
    pairs = [(as_text(row, "history", q), as_text(row, "history", a)) for q, a in turns]
    return tuple(m for q, a in pairs for m in (Message("user", q), Message("assistant", a)))


def _from_instances(row: Row) -> Example:
    field, instruction = text_of(row, ("instruction",), "alpaca")
    instances = row.fields["instances"]
    if not isinstance(instances, list) or not instances or not all(isinstance(i, Mapping) for i in instances):
        found = type_name(instances)
        raise BadRow(row_finding(WRONG_TYPE, row.id, "instances", found=found, expected="a list of objects"))
    if not instruction.strip():
        raise BadRow(row_finding(EMPTY_PROMPT, row.id, field))
    messages: list[Message] = []
    for instance in instances:
        part = Row(row.id, instance)
        prompt = joined(instruction, optional_text(part, _INPUT))
        messages += [Message("user", prompt), Message("assistant", text_of(part, _OUTPUT, "alpaca")[1])]
    check_answers(row, "instances", messages)
    return Example(row.id, tuple(messages))
