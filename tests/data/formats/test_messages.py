"""Conversations in all their spellings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from finitune.core.types import Finding
from finitune.data.records import Example

Turns = Callable[[str, dict[str, Any]], list[tuple[str, str]]]
Fault = Callable[[str, dict[str, Any]], tuple[str, str]]
Read = Callable[[str, dict[str, Any]], "Example | Finding"]

USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation", "dialogs", "dialog"])
def test_column_names(turns: Turns, column: str) -> None:
    assert turns("messages", {column: [USER, REPLY]}) == [("user", "Hi"), ("assistant", "Hello")]


def test_sharegpt(turns: Turns) -> None:
    row = {
        "system": "Be kind",
        "conversations": [
            {"from": "human", "value": "Q"},
            {"from": "gpt", "value": "A"},
            {"from": "human", "value": "R"},
            {"from": "bot", "value": "B"},
        ],
    }
    roles = [r for r, _ in turns("messages", row)]
    assert roles == ["system", "user", "assistant", "user", "assistant"]


def test_function_calls_and_observations(read: Read) -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Graz"}}'},
            {"from": "observation", "value": '{"sky": "blue"}'},
            {"from": "gpt", "value": "Blue."},
        ],
        "tools": '[{"name": "weather", "parameters": {}}]',
    }
    example = read("messages", row)
    assert isinstance(example, Example)
    assert [m.role for m in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert example.messages[1].tool_calls == ({"name": "weather", "arguments": {"city": "Graz"}},)
    assert example.tools == ({"type": "function", "function": {"name": "weather", "parameters": {}}},)


def test_openai_tool_calls_with_arguments_as_text(read: Read) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    example = read("messages", {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]})
    assert isinstance(example, Example)
    assert example.messages[1].content == ""
    assert example.messages[1].tool_calls == ({"name": "f", "arguments": {"x": 1}},)


def test_xtuner_pairs(read: Read) -> None:
    row = {
        "conversation": [
            {"system": "S", "input": "Q", "output": "A", "output_with_loss": False},
            {"input": "R", "output": "B"},
        ]
    }
    example = read("messages", row)
    assert isinstance(example, Example)
    assert [(m.role, m.content, m.is_supervised()) for m in example.messages] == [
        ("system", "S", False),
        ("user", "Q", False),
        ("assistant", "A", False),
        ("user", "R", False),
        ("assistant", "B", True),
    ]


@pytest.mark.parametrize("wish", [{"weight": 0}, {"train": False}])
def test_a_turn_may_ask_not_to_be_trained(read: Read, wish: dict[str, Any]) -> None:
    example = read("messages", {"messages": [USER, {**REPLY, **wish}, USER, REPLY]})
    assert isinstance(example, Example)
    assert [m.is_supervised() for m in example.messages] == [False, False, False, True]


def test_text_parts_and_reasoning(turns: Turns) -> None:
    parts = [{"type": "reasoning", "value": "hm"}, {"type": "text", "text": "Hel"}, {"type": "text", "value": "lo"}]
    row = {"messages": [USER, {"role": "assistant", "content": parts}]}
    assert turns("messages", row)[1] == ("assistant", "<think>\nhm\n</think>\n\nHello")
    row = {"messages": [USER, {**REPLY, "reasoning_content": "hm"}]}
    assert turns("messages", row)[1] == ("assistant", "<think>\nhm\n</think>\n\nHello")


def test_the_chosen_answer_of_a_preference_row_ends_the_conversation(turns: Turns) -> None:
    row = {
        "conversations": [{"from": "human", "value": "Q"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    }
    assert turns("messages", row) == [("user", "Q"), ("assistant", "good")]


def test_pretrain_turns_are_a_document(read: Read) -> None:
    example = read("messages", {"messages": [{"role": "pretrain", "content": "Once."}]})
    assert isinstance(example, Example)
    assert (example.text, example.messages) == ("Once.", ())


@pytest.mark.parametrize(
    ("turns_given", "expected"),
    [
        ([USER], ("DAT038", "messages")),
        ([USER, {**REPLY, "content": ""}], ("DAT035", "messages[1]")),
        ([USER, {**REPLY, "weight": 0}], ("DAT038", "messages")),
        ([USER, {**REPLY, "weight": 0.5}], ("DAT034", "messages[1].weight")),
        ([USER, {"role": "assitant", "content": "x"}], ("DAT037", "messages[1].role")),
        ([USER, {"content": "x"}], ("DAT037", "messages[1].role")),
        ([USER, {"role": 3, "content": "x"}], ("DAT037", "messages[1].role")),
        ([USER, {"role": "assistant"}], ("DAT033", "messages[1].content")),
        ([USER, {**REPLY, "content": 7}], ("DAT034", "messages[1]")),
        ([USER, "Hello"], ("DAT034", "messages[1]")),
        ([], ("DAT034", "messages")),
        ("Hello", ("DAT034", "messages")),
        ([{**USER, "content": [{"type": "image_url", "image_url": {}}]}, REPLY], ("DAT039", "messages[0]")),
        ([USER, {"role": "function_call", "content": "no json"}], ("DAT034", "messages[1]")),
        ([USER, {**REPLY, "tool_calls": [3]}], ("DAT034", "messages[1]")),
        ([USER, {**REPLY, "content": "\ud83d"}], ("DAT047", "messages[1]")),
    ],
)
def test_faults_name_the_turn(fault: Fault, turns_given: Any, expected: tuple[str, str]) -> None:
    assert fault("messages", {"messages": turns_given}) == expected


def test_tools_must_be_a_list_of_objects(fault: Fault) -> None:
    for tools in ("{broken", '{"name": "f"}', [3]):
        assert fault("messages", {"messages": [USER, REPLY], "tools": tools}) == ("DAT034", "tools")
