"""What every test gets: closed journals, an English tongue."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _english(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages are compared in English unless a test says otherwise."""
    monkeypatch.setenv("FINITUNE_LANG", "en")


@pytest.fixture(autouse=True)
def _closed_journals() -> Iterator[None]:
    """Close the journals of ``support.runs.loop_of``."""
    yield
    import sys

    runs = sys.modules.get("support.runs")
    while runs is not None and runs.OPEN:
        runs.OPEN.pop().close()
