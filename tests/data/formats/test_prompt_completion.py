"""Prompt and answer under the names people use."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from finitune.data.formats.prompt_completion import sniff

Turns = Callable[[str, dict[str, Any]], list[tuple[str, str]]]
Fault = Callable[[str, dict[str, Any]], tuple[str, str]]


def test_all_names(turns: Turns) -> None:
    prompts = ("prompt", "question", "query", "problem")
    answers = ("completion", "response", "answer", "chosen", "solution")
    for prompt, answer in product(prompts, answers):
        assert turns("prompt_completion", {prompt: "Q", answer: "A"}) == [("user", "Q"), ("assistant", "A")]


def test_text_is_kept_as_it_is(turns: Turns) -> None:
    assert turns("prompt_completion", {"prompt": " Q \n", "completion": " A "}) == [
        ("user", " Q \n"),
        ("assistant", " A "),
    ]


def test_lists_of_turns_on_both_sides(turns: Turns) -> None:
    head = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    tail = [{"role": "assistant", "content": "A"}]
    expected = ["S", "Q", "A"]
    assert [c for _, c in turns("prompt_completion", {"prompt": head, "completion": tail})] == expected
    assert [c for _, c in turns("prompt_completion", {"prompt": head, "chosen": head + tail})] == expected
    assert [c for _, c in turns("prompt_completion", {"prompt": head, "completion": "A"})] == expected


def test_turns_of_the_prompt_are_context(read: Callable[..., Any]) -> None:
    head = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}, {"role": "user", "content": "R"}]
    example = read("prompt_completion", {"prompt": head, "completion": "B"})
    assert [m.is_supervised() for m in example.messages] == [False, False, False, True]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Q", "completion": ""}, ("DAT035", "completion")),
        ({"prompt": "", "completion": "A"}, ("DAT036", "prompt")),
        ({"prompt": "Q"}, ("DAT033", "completion")),
        ({"completion": "A"}, ("DAT033", "prompt")),
        ({"prompt": 3, "completion": "A"}, ("DAT034", "prompt")),
        ({"prompt": [{"role": "user", "content": "Q"}]}, ("DAT033", "completion")),
    ],
)
def test_faults_name_the_field(fault: Fault, row: dict[str, Any], expected: tuple[str, str]) -> None:
    assert fault("prompt_completion", row) == expected


def test_a_prompt_without_an_answer_is_not_this_format() -> None:
    assert sniff({"prompt": "Q", "reward_model": {}}) == 0.0
