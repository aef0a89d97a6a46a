"""The journal outlives a refusing disk and a vanished folder: nothing is lost and nothing is torn."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finitune.core import journal as subject
from finitune.core.journal import Damage, Journal, Reason, check, read
from support.journals import StandingClock, put, steps, undisturbed

REAL_WRITE = os.write
posix = pytest.mark.skipif(sys.platform == "win32", reason="open files cannot be removed there")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "journal.jsonl"


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> StandingClock:
    return StandingClock(monkeypatch)


class Disk:
    """Refuses everything as long as ``refusal`` (a number of the system) is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refusal: int | None = None
        self.calls = 0
        monkeypatch.setattr(os, "write", self.write)

    def write(self, descriptor: int, content: bytes) -> int:
        self.calls += 1
        if self.refusal is not None:
            raise OSError(self.refusal, os.strerror(self.refusal))
        return REAL_WRITE(descriptor, content)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


# ---- a refusing disk ----


@pytest.mark.parametrize("refusal", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.ENODEV])
def test_what_the_disk_refuses_waits_and_is_written_in_order(
    path: Path, disk: Disk, clock: StandingClock, refusal: int
) -> None:
    journal = Journal(path)
    put(journal, 1, 2)
    disk.refusal = refusal
    put(journal, 3, 5)
    assert journal.fault is not None
    assert journal.fault.errno == refusal
    assert journal.pending_bytes > 300
    assert steps(path) == [1, 2]
    assert [r["step"] for r in journal.waiting()] == [3, 4, 5]
    with pytest.raises(OSError, match=r"bytes wait") as caught:
        journal.sync()
    assert caught.value.errno == refusal
    disk.refusal = None
    clock.now_s += 60
    put(journal, 6, 6)
    assert (journal.fault, journal.pending_bytes, journal.waiting()) == (None, 0, [])
    journal.close()
    assert path.read_bytes() == undisturbed(path.parent, 6)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answers=st.lists(st.one_of(st.just(-1), st.just(0), st.integers(1, 90), st.just(10**6)), max_size=25))
def test_any_partial_writes_give_the_file_of_undisturbed_ones(tmp_path_factory, answers: list[int]) -> None:
    """-1: refused, 0: took nothing, else: took so many bytes. At every moment the file is a prefix."""
    folder = tmp_path_factory.mktemp("partial")
    script = iter(answers)

    def write(descriptor: int, content: bytes) -> int:
        answer = next(script, 10**6)
        if answer < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return REAL_WRITE(descriptor, content[:answer]) if answer else 0

    expected = undisturbed(folder, 8)
    journal = Journal(folder / "j")
    with mock.patch.object(os, "write", write), mock.patch.object(subject, "_FIRST_PAUSE_S", 0.0):
        journal._pause_s = 0.0
        for step in range(1, 9):
            put(journal, step, step)
            content = journal.path.read_bytes()
            assert expected.startswith(content)
            said = expected.index(b"\n", expected.index(b'"step": %d' % step)) + 1
            assert len(content) + journal.pending_bytes == said
            assert (journal.fault is None) == (journal.pending_bytes == 0)
        for _ in answers:
            try:
                journal.sync()
            except OSError:
                continue
    journal.close()
    assert journal.path.read_bytes() == expected


def test_a_system_that_takes_no_byte_is_a_refusal_and_no_endless_loop(path: Path, monkeypatch) -> None:
    journal = Journal(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda *_: 0)
        put(journal, 1, 1)
    assert journal.fault is not None
    assert journal.fault.errno == errno.EIO
    journal.close()
    assert steps(path) == [1]


def test_a_record_of_which_the_file_has_a_part_still_waits(path: Path, monkeypatch) -> None:
    answers = iter([30, 0])
    journal = Journal(path)
    put(journal, 1, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, content: REAL_WRITE(descriptor, content[: next(answers, 0)]))
        put(journal, 2, 3)
        assert steps(path) + [r["step"] for r in journal.waiting()] == [1, 2, 3]
    journal.close()


def test_bytes_written_without_being_told_so_are_not_doubled(path: Path, monkeypatch) -> None:
    """An interrupt after the system took the bytes, or a network file system that refuses too late."""

    def takes_and_fails(descriptor: int, content: bytes) -> int:
        REAL_WRITE(descriptor, content[:50])
        raise KeyboardInterrupt

    journal = Journal(path)
    put(journal, 1, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", takes_and_fails)
        with pytest.raises(KeyboardInterrupt):
            put(journal, 2, 2)
    put(journal, 3, 3)
    journal.close()
    assert path.read_bytes() == undisturbed(path.parent, 3)


def test_a_refused_write_is_not_tried_again_at_every_line(path: Path, disk: Disk, clock: StandingClock) -> None:
    journal = Journal(path)
    disk.refusal, disk.calls = errno.ENOSPC, 0
    for step in range(1, 1001):
        clock.now_s += 0.01
        put(journal, step, step)
    assert 5 <= disk.calls <= 12
    for _ in range(3):
        with pytest.raises(OSError, match="No space left"):
            journal.sync()
    assert disk.calls >= 8
    disk.refusal = None
    journal.close()
    assert path.read_bytes() == undisturbed(path.parent, 1000)


def test_when_too_much_waits_the_record_is_refused_and_the_others_still_wait(
    path: Path, disk: Disk, clock: StandingClock
) -> None:
    journal = Journal(path, max_pending_bytes=500)
    disk.refusal = errno.ENOSPC
    put(journal, 1, 4)
    pending = journal.pending_bytes
    with pytest.raises(OSError, match="No space left") as caught:
        put(journal, 5, 5)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert journal.pending_bytes == pending <= 500
    disk.refusal = None
    put(journal, 5, 5)  # without waiting for the clock: this is the last chance
    journal.close()
    assert path.read_bytes() == undisturbed(path.parent, 5)


def test_a_record_larger_than_what_may_wait_is_written_while_nothing_waits(path: Path) -> None:
    journal = Journal(path, max_pending_bytes=10)
    put(journal, 1, 2)
    journal.close()
    assert steps(path) == [1, 2]


def test_close_tells_what_still_waits_and_can_be_tried_again(path: Path, disk: Disk) -> None:
    journal = Journal(path)
    put(journal, 1, 1)
    disk.refusal = errno.ENOSPC
    put(journal, 2, 2)
    with pytest.raises(OSError, match="No space left"):
        journal.close()
    disk.refusal = None
    journal.close()
    assert path.read_bytes() == undisturbed(path.parent, 2)


def test_giving_up_says_how_much_is_lost(path: Path, disk: Disk) -> None:
    journal = Journal(path)
    disk.refusal = errno.ENOSPC
    put(journal, 1, 1)
    assert journal.abandon() == len(undisturbed(path.parent, 0)) + journal.pending_bytes > 0
    with pytest.raises(ValueError, match="closed"):
        put(journal, 2, 2)


def test_what_a_failed_fsync_has_forgotten_is_written_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the failure the system says that all is well, but the pages are gone: here the file loses them."""
    journal = Journal(path)
    put(journal, 1, 2)
    journal.sync()
    durable = path.stat().st_size
    put(journal, 3, 4)

    def forgets(descriptor: int) -> None:
        os.ftruncate(descriptor, durable)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", forgets)
        with pytest.raises(OSError, match="Input/output error"):
            journal.sync()
    assert journal.fault is not None
    assert journal.pending_bytes > 0
    put(journal, 5, 5)
    journal.close()
    assert path.read_bytes() == undisturbed(path.parent, 5)


def test_memory_is_bounded_by_a_sync_now_and_then(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(subject, "_UNSYNCED_BYTES", 1000)
    monkeypatch.setattr(os, "fsync", synced.append)
    journal = Journal(path)
    for step in range(1, 101):
        put(journal, step, step)
        assert len(journal._stream.unsynced) < 1000
    assert 5 < len(synced) < 30
    journal.abandon()


def test_a_sync_reaches_the_folder_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[Path] = []
    monkeypatch.setattr(subject, "fsync_path", reached.append)
    journal = Journal(path)
    journal.sync()
    journal.sync()
    journal.close()
    assert reached == [path.parent]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_the_full_device_refuses_and_loses_nothing() -> None:
    journal = Journal(Path("/dev/full"))
    put(journal, 1, 3)
    assert journal.fault is not None
    assert journal.fault.errno == errno.ENOSPC
    assert [r["step"] for r in journal.waiting()] == [1, 2, 3]
    journal.abandon()


def _write_below_a_limit(path: Path, limit_bytes: int, last: int) -> None:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    journal = Journal(path)
    put(journal, 1, last)
    assert journal.fault is not None
    assert path.stat().st_size == limit_bytes
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    journal.close()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # newer Pythons warn of forks beside threads
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_limit_that_the_system_enforces_in_mid_line_tears_nothing(path: Path) -> None:
    """A real short write, and real refusals: the file's size is limited in a child process."""
    path.parent.mkdir()
    expected = undisturbed(path.parent, 10)
    child = multiprocessing.get_context("fork").Process(
        target=_write_below_a_limit, args=(path, len(expected) // 2 + 7, 10)
    )
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert path.read_bytes() == expected


# ---- a vanished folder ----


def removed(path: Path) -> None:
    shutil.rmtree(path.parent)


def replaced(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.touch()


def renamed(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))


@posix
@pytest.mark.parametrize("vanish", [removed, replaced, renamed])
def test_a_journal_that_is_gone_from_its_path_is_told_by_sync_and_close(path: Path, vanish: Callable) -> None:
    journal = Journal(path)
    put(journal, 1, 2)
    journal.sync()
    put(journal, 3, 3)
    vanish(path)
    with pytest.raises(FileNotFoundError, match="gone from its path"):
        journal.sync()
    with pytest.raises(FileNotFoundError):
        journal.close()
    assert [r["step"] for r in journal.waiting()] == [3]
    journal.abandon()


@posix
def test_a_folder_that_comes_back_as_it_was_goes_on_as_if_nothing_had_been(path: Path, clock: StandingClock) -> None:
    journal = Journal(path)
    put(journal, 1, 2)
    journal.sync()
    renamed(path)
    put(journal, 3, 3)
    with pytest.raises(FileNotFoundError):
        journal.sync()
    clock.now_s += 60
    put(journal, 4, 4)
    assert journal.pending_bytes > 0, "nothing is written to a file that is not at its path"
    path.parent.with_name("elsewhere").rename(path.parent)
    clock.now_s += 60
    put(journal, 5, 5)
    journal.close()
    assert path.read_bytes() == undisturbed(path.parent, 5)


@posix
@pytest.mark.parametrize("kept", ["all", "synced", "some", "half a line"])
def test_reopening_finds_the_file_that_came_back_and_goes_on_in_it(path: Path, kept: str) -> None:
    """A disk that was mounted again is another inode, and may have lost what was not synced."""
    journal = Journal(path)
    put(journal, 1, 2)
    journal.sync()
    synced = path.read_bytes()
    put(journal, 3, 5)
    content = path.read_bytes()
    removed(path)
    path.parent.mkdir()
    path.write_bytes(
        {"all": content, "synced": synced, "some": content[: -len(synced) // 2], "half a line": content[:-7]}[kept]
    )
    with pytest.raises(FileNotFoundError):
        journal.sync()
    journal.reopen()
    put(journal, 6, 6)
    journal.close()
    assert path.read_bytes() == undisturbed(path.parent, 6)


@posix
def test_reopening_in_a_new_folder_keeps_all_that_was_not_synced_and_the_gap_can_be_seen(path: Path) -> None:
    journal = Journal(path)
    put(journal, 1, 2)
    journal.sync()
    put(journal, 3, 3)
    removed(path)
    with pytest.raises(FileNotFoundError):
        journal.reopen()
    put(journal, 4, 4)
    path.parent.mkdir()
    journal.reopen()
    put(journal, 5, 5)
    journal.close()
    assert steps(path) == [3, 4, 5]
    assert check(path) == [Damage(1, Reason.GAP)]


@posix
def test_reopening_where_another_journal_stands_touches_none_of_its_lines(path: Path) -> None:
    journal = Journal(path)
    put(journal, 1, 1)
    removed(path)
    other = Journal(path)
    put(other, 101, 102)
    other.close()
    content = path.read_bytes()
    journal.reopen()
    put(journal, 2, 2)
    journal.close()
    assert path.read_bytes().startswith(content)
    assert [r["step"] for r in read(path) if r["step"] < 100][-1:] == [2]
    assert check(path) != []


@posix
def test_reopening_that_fails_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(path)
    put(journal, 1, 1)

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", refuse)
        with pytest.raises(OSError, match="Input/output"):
            journal.reopen()
    put(journal, 2, 2)
    journal.close()
    assert path.read_bytes() == undisturbed(path.parent, 2)


def test_no_descriptor_is_left_open(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: set[int] = set()
    real_open, real_close = os.open, os.close

    def opening(*arguments: object, **names: object) -> int:
        opened.add(descriptor := real_open(*arguments, **names))
        return descriptor

    def closing(descriptor: int) -> None:
        opened.discard(descriptor)
        real_close(descriptor)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "close", closing)
    journal = Journal(path)
    put(journal, 1, 2)
    journal.reopen()
    journal.close()
    path.write_bytes(path.read_bytes() + b"torn")
    monkeypatch.setattr(os, "ftruncate", mock.Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        Journal(path)
    assert opened == set()
