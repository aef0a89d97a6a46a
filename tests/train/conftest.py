"""Killed runs that several files of tests start from, and a plan that does not measure the machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.killed import Killed, killed_run


@pytest.fixture
def quick_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time is spent on measuring how fast the machine is: nobody reads the estimate here."""
    from finitune.train import plan

    monkeypatch.setattr(plan, "measured_flops", lambda *_args, **_kw: 1e9)


@pytest.fixture(scope="session")
def full(tmp_path_factory) -> Killed:
    """A full fine-tune."""
    return killed_run(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="session")
def lora(tmp_path_factory) -> Killed:
    """Adapters with dropout on a base model that lies in a folder."""
    home = tmp_path_factory.mktemp("lora")
    base = killed_run(home / "base_of", "max_steps=2", step=1).whole / "final"
    return killed_run(home, "lora={r: 2, lora_dropout: 0.1}", model=str(base))


@pytest.fixture
def open_sessions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sessions that a test opened and did not run are closed."""
    from finitune.train import run

    opened: list = []
    real = run.Session

    def remembered(*args, **kw):
        opened.append(real(*args, **kw))
        return opened[-1]

    monkeypatch.setattr(run, "Session", remembered)
    yield
    for session in opened:
        session.journal.abandon()
        session.start.close()
