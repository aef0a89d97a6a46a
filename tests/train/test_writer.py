"""The writer does one thing after the other, beside the training, and tells whatever came of it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from finitune.train.writer import Writer, Written

NAME = "finitune-writer"


class Gate:
    """Work that lasts until it is told to end."""

    def __init__(self) -> None:
        self.begun, self.open = threading.Event(), threading.Event()

    def __call__(self) -> Path:
        self.begun.set()
        assert self.open.wait(20)
        return Path("gate")


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


def gone(what: BaseException):
    def work() -> Path:
        raise what

    return work


@pytest.mark.parametrize("background", [True, False])
def test_all_work_is_done_in_order_and_told_once(background: bool) -> None:
    writer, done = Writer(background=background), []

    def work(step: int) -> Path:
        time.sleep(0.001 * (7 - step))  # the later ones are quicker
        done.append(step)
        return Path(f"checkpoint-{step}")

    for step in range(1, 8):
        writer.submit(step, lambda step=step: work(step))
    found = writer.finished(wait=True)
    assert done == list(range(1, 8))
    assert found == [Written(step, Path(f"checkpoint-{step}")) for step in range(1, 8)]
    assert writer.finished(wait=True) == writer.finished() == []
    assert not writer.busy


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), ValueError("x"), MemoryError(), SystemExit(3), KeyboardInterrupt()],
)
def test_an_error_is_told_with_its_step_and_what_follows_is_done_all_the_same(
    background: bool, error: BaseException
) -> None:
    writer = Writer(background=background)
    writer.submit(1, gone(error))
    writer.submit(2, lambda: Path("two"))
    first, second = writer.finished(wait=True)
    assert (first.step, first.path) == (1, None)
    assert first.error is error
    assert second == Written(2, Path("two"))


def test_in_the_background_the_caller_does_not_wait(gate: Gate) -> None:
    writer = Writer(background=True)
    started_s = time.perf_counter()
    writer.submit(1, gate)
    assert time.perf_counter() - started_s < 5
    assert gate.begun.wait(10)
    assert writer.busy
    assert writer.finished() == []
    assert writer.busy
    gate.open.set()
    assert writer.finished(wait=True) == [Written(1, Path("gate"))]
    assert not writer.busy


def test_it_is_busy_until_what_was_done_has_been_asked_for() -> None:
    """Somebody has to take the result in: until then the work is not over."""
    writer = Writer(background=True)
    writer.submit(1, lambda: Path("a"))
    deadline = time.monotonic() + 10
    while writer._done.empty() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert writer.busy
    assert writer.finished() == [Written(1, Path("a"))]
    assert not writer.busy


def test_without_waiting_only_what_is_done_is_told(gate: Gate) -> None:
    writer = Writer(background=True)
    writer.submit(1, lambda: Path("quick"))
    writer.submit(2, gate)
    assert gate.begun.wait(10)
    assert writer.finished() == [Written(1, Path("quick"))]
    assert writer.finished() == []
    gate.open.set()
    assert writer.finished(wait=True) == [Written(2, Path("gate"))]


def test_waiting_ends_as_soon_as_the_work_does(gate: Gate) -> None:
    writer = Writer(background=True)
    writer.submit(1, gate)
    threading.Timer(0.05, gate.open.set).start()
    started_s = time.perf_counter()
    assert len(writer.finished(wait=True)) == 1
    assert time.perf_counter() - started_s < 10


def test_waiting_for_nothing_returns_at_once() -> None:
    for background in (True, False):
        writer = Writer(background=background)
        assert not writer.busy
        assert writer.finished(wait=True) == []


def test_without_background_the_work_is_over_when_it_was_handed_over() -> None:
    writer, threads = Writer(background=False), []
    writer.submit(1, lambda: threads.append(threading.current_thread()) or Path("a"))
    assert threads == [threading.current_thread()]
    assert writer.busy
    assert writer.finished() == [Written(1, Path("a"))]


def test_one_daemon_thread_serves_all_and_there_is_none_before_the_first_work() -> None:
    before = [t for t in threading.enumerate() if t.name == NAME]
    writer, threads = Writer(background=True), set()
    assert [t for t in threading.enumerate() if t.name == NAME] == before
    for step in range(5):
        writer.submit(step, lambda: threads.add(threading.current_thread()) or Path("a"))
    writer.finished(wait=True)
    assert len(threads) == 1
    (thread,) = threads
    assert thread.daemon
    assert thread.name == NAME
    assert thread is not threading.current_thread()


ENDLESS = """
import threading
from pathlib import Path
from finitune.train.writer import Writer
begun = threading.Event()
def endless():
    begun.set()
    threading.Event().wait()
    return Path("never")
Writer(background=True).submit(1, endless)
assert begun.wait(20)
print("over")
"""


def test_a_program_ends_although_something_is_still_being_written() -> None:
    done = subprocess.run([sys.executable, "-c", ENDLESS], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "over"), done.stderr
