"""Running the command line inside the test process."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from finitune.cli.main import main


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def record(self) -> dict:
        """The one JSON object on stdout."""
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def _english(monkeypatch):
    monkeypatch.setenv("FINITUNE_LANG", "en")


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    """Run ``finitune ARGUMENTS`` in an empty folder, in English unless told otherwise."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Ran:
        capsys.readouterr()
        code = main(arguments)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run
