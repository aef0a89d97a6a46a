"""Alpaca rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Turns = Callable[[str, dict[str, Any]], list[tuple[str, str]]]
Fault = Callable[[str, dict[str, Any]], tuple[str, str]]


def test_instruction_and_input_are_one_prompt(turns: Turns) -> None:
    row = {"instruction": "Add", "input": "1 and 2", "output": "3"}
    assert turns("alpaca", row) == [("user", "Add\n1 and 2"), ("assistant", "3")]


@pytest.mark.parametrize("empty", ["", "  ", None])
def test_an_empty_input_adds_nothing(turns: Turns, empty: str | None) -> None:
    assert turns("alpaca", {"instruction": "Hi", "input": empty, "output": "Yo"})[0] == ("user", "Hi")


def test_system_and_history_come_first(turns: Turns) -> None:
    row = {"instruction": "C?", "output": "c", "system": "S", "history": [["A?", "a"], ["B?", "b"]]}
    assert [c for _, c in turns("alpaca", row)] == ["S", "A?", "a", "B?", "b", "C?", "c"]


def test_other_names_of_the_same_columns(turns: Turns) -> None:
    row = {"instruction": "Add", "context": "1 and 2", "response": "3", "category": "x"}
    assert turns("alpaca", row) == [("user", "Add\n1 and 2"), ("assistant", "3")]


def test_seed_tasks_lose_no_instance(turns: Turns) -> None:
    row = {"instruction": "Negate", "instances": [{"input": "1", "output": "-1"}, {"input": "2", "output": "-2"}]}
    assert [c for _, c in turns("alpaca", row)] == ["Negate\n1", "-1", "Negate\n2", "-2"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"output": ""}, ("DAT035", "output")),
        ({"output": " \n"}, ("DAT035", "output")),
        ({"output": None}, ("DAT033", "output")),
        ({"output": 3}, ("DAT034", "output")),
        ({"instruction": " "}, ("DAT036", "instruction")),
        ({"instruction": None}, ("DAT033", "instruction")),
        ({"input": 5}, ("DAT034", "input")),
        ({"output": "half \ud83d"}, ("DAT047", "output")),
        ({"history": [["only a question"]]}, ("DAT034", "history")),
        ({"history": [["A?", ""]]}, ("DAT035", "history[1]")),
        ({"images": ["a.jpg"]}, ("DAT039", "images")),
    ],
)
def test_faults_name_the_field(fault: Fault, change: dict[str, Any], expected: tuple[str, str]) -> None:
    assert fault("alpaca", {"instruction": "Add", "output": "3", **change}) == expected


@pytest.mark.parametrize("instances", [[], "x", [3], [{"input": "1"}]])
def test_broken_instances(fault: Fault, instances: Any) -> None:
    assert fault("alpaca", {"instruction": "Negate", "instances": instances})[0] in ("DAT034", "DAT033")
