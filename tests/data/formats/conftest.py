"""Reading one row by a named format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from finitune.core.registry import load
from finitune.core.types import Finding, RowId
from finitune.data.records import Example, Row


@pytest.fixture(scope="session")
def read() -> Callable[[str, dict[str, Any]], Example | Finding]:
    def read_row(name: str, fields: dict[str, Any]) -> Example | Finding:
        result: Example | Finding = load("formats", name).to_messages(Row(RowId("r.jsonl", 3, "0f"), fields))
        return result

    return read_row


@pytest.fixture(scope="session")
def turns(read: Callable[..., Any]) -> Callable[[str, dict[str, Any]], list[tuple[str, str]]]:
    """(role, content) of a row that must be good."""

    def turns_of(name: str, fields: dict[str, Any]) -> list[tuple[str, str]]:
        example = read(name, fields)
        assert isinstance(example, Example), example
        return [(m.role, m.content) for m in example.messages]

    return turns_of


@pytest.fixture(scope="session")
def fault(read: Callable[..., Any]) -> Callable[[str, dict[str, Any]], tuple[str, str]]:
    """(code, field) of a row that must be bad."""

    def fault_of(name: str, fields: dict[str, Any]) -> tuple[str, str]:
        finding = read(name, fields)
        assert isinstance(finding, Finding), finding
        return finding.code, str(finding.data["field"])

    return fault_of
