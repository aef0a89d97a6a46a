"""Plain documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.parametrize("column", ["text", "content", "document"])
def test_column_names(read: Callable[..., Any], column: str) -> None:
    assert read("text", {column: " Once. \n"}).text == " Once. \n"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": ""}, ("DAT036", "text")),
        ({"text": 1.5}, ("DAT034", "text")),
        ({"words": "x"}, ("DAT033", "text")),
        ({"text": "caption", "image": "a.jpg"}, ("DAT039", "image")),
    ],
)
def test_faults_name_the_field(fault: Callable[..., Any], row: dict[str, Any], expected: tuple[str, str]) -> None:
    assert fault("text", row) == expected
