"""The lock of a run: one living process a folder, free again however that process ends."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finitune.core.errors import UserError
from finitune.train import lock
from finitune.train.lock import LOCK_FILE, hold, holder, in_use

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs fork, SIGKILL or file rights of POSIX")
NOT_ROOT = pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() == 0, reason="root may write everywhere")

HOLD = """
import sys
from pathlib import Path
from finitune.train.lock import hold
give_back = hold(Path(sys.argv[1]))
print("held", flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


class Other:
    """Another process that holds a run's lock."""

    def __init__(self, run_dir: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(run_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid
        assert self.process.stdout.readline() == "held\n"

    def do(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


@contextmanager
def other(run_dir: Path):
    """Somebody else's lock, taken away in the end."""
    process = Other(run_dir)
    try:
        yield process
    finally:
        process.kill()
        process.process.stdin.close()
        process.process.stdout.close()


@pytest.fixture
def run_dir(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    return path


def refused(run_dir: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        hold(run_dir)
    return caught.value


def test_a_lock_is_held_until_it_is_given_back_and_leaves_no_trace(run_dir):
    assert not in_use(run_dir)
    give_back = hold(run_dir)
    assert in_use(run_dir)
    give_back()
    assert not in_use(run_dir)
    assert list(run_dir.iterdir()) == []


def test_giving_back_twice_does_not_give_back_the_next_lock(run_dir):
    """The number of a closed descriptor is used again at once."""
    first = hold(run_dir)
    first()
    second = hold(run_dir)
    first()
    assert in_use(run_dir)
    second()
    assert not in_use(run_dir)


def test_a_second_process_is_refused_by_name(run_dir):
    with other(run_dir) as process:
        error = refused(run_dir)
    assert (error.code.code, error.exit_code) == ("SYS030", 2)
    assert error.data["pid"] == process.pid
    assert f"pid {process.pid}, host {error.data['host']}" in str(error)
    assert f"finitune train --resume {run_dir}" in str(error)


def test_a_second_run_in_the_same_process_is_refused_too(run_dir):
    give_back = hold(run_dir)
    assert refused(run_dir).data["pid"] == os.getpid()
    give_back()


def test_a_killed_holder_holds_nothing(run_dir):
    with other(run_dir) as process:
        process.kill()
        assert (run_dir / LOCK_FILE).exists()
        assert not in_use(run_dir)
        give_back = hold(run_dir)
        assert holder(run_dir)["pid"] == os.getpid()
        give_back()


def test_asking_leaves_no_trace_and_takes_nothing_away(run_dir):
    with other(run_dir):
        before = (run_dir / LOCK_FILE).read_bytes()
        assert all(in_use(run_dir) for _ in range(50))
        assert (run_dir / LOCK_FILE).read_bytes() == before
        assert refused(run_dir).code.code == "SYS030"
    empty = run_dir / "empty"
    empty.mkdir()
    assert not in_use(empty)
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize("name", ["absent", "a\0b", "x" * 5000, "file"])
def test_asking_of_what_is_no_run_is_answered_no(run_dir, name):
    (run_dir / "file").write_text("x")
    assert not in_use(run_dir / name)
    assert holder(run_dir / name) == {}


def test_who_asks_does_not_drive_away_who_wants_to_hold(run_dir):
    """Asking takes a shared lock for a moment."""
    (run_dir / LOCK_FILE).touch()
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            in_use(run_dir)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            hold(run_dir)()
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_of_many_who_want_it_one_at_a_time_has_it(run_dir):
    """Also while holders remove the file under the feet of the others."""
    inside, most, taken, refusals = [0], [0], [0], set()
    guard = threading.Lock()
    end_s = time.monotonic() + 0.5

    def compete() -> None:
        while time.monotonic() < end_s:
            try:
                give_back = hold(run_dir)
            except UserError as error:
                refusals.add(error.code.code)
                continue
            with guard:
                inside[0] += 1
                taken[0] += 1
                most[0] = max(most[0], inside[0])
            with guard:
                inside[0] -= 1
            give_back()

    threads = [threading.Thread(target=compete) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1
    assert refusals <= {"SYS030"}
    assert taken[0] > 10


@POSIX
def test_a_forked_child_neither_gives_back_nor_keeps_the_lock(run_dir):
    with other(run_dir) as process:
        process.do(
            "import os; child = os.fork(); give_back() if child == 0 else os.waitpid(child, 0); child or os._exit(0)"
        )
        assert in_use(run_dir), "the child's end took the parent's lock"
        process.do(
            "import os, time; child = os.fork(); child or (time.sleep(60), os._exit(0)); "
            "open(sys.argv[1] + '/child', 'w').write(str(child))"
        )
        child = int((run_dir / "child").read_text())
        try:
            assert in_use(run_dir)
            process.kill()
            os.kill(child, 0)
            # The child closes its copy as the first thing it does, once it is scheduled.
            until_s = time.monotonic() + 10
            while in_use(run_dir) and time.monotonic() < until_s:
                time.sleep(0.01)
            assert not in_use(run_dir), "an orphan keeps the lock of a dead run"
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_started_program_does_not_inherit_the_lock(run_dir):
    give_back = hold(run_dir)
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
    try:
        give_back()
        (run_dir / LOCK_FILE).touch()
        assert not in_use(run_dir)
        hold(run_dir)()
    finally:
        sleeper.kill()
        sleeper.wait(10)


def test_a_run_that_was_moved_aside_keeps_its_lock_and_the_new_one_gets_its_own(run_dir):
    old = hold(run_dir)
    aside = run_dir.rename(run_dir.with_name("run.old-1"))
    run_dir.mkdir()
    new = hold(run_dir)
    assert in_use(aside)
    old()
    assert in_use(run_dir), "the old holder removed the new one's file"
    new()
    assert not in_use(aside)


@POSIX
@NOT_ROOT
def test_a_folder_that_cannot_be_written_to_is_told_and_can_be_asked(run_dir):
    with other(run_dir):
        run_dir.chmod(0o555)
        (run_dir / LOCK_FILE).chmod(0o444)
        try:
            assert in_use(run_dir)
            assert refused(run_dir).code.code == "SYS004"
        finally:
            run_dir.chmod(0o755)


def test_an_absent_folder_is_told(tmp_path):
    error = refused(tmp_path / "absent")
    assert error.code.code == "SYS004"
    assert str(tmp_path / "absent") in str(error)


def test_a_lock_file_that_is_a_folder_is_told(run_dir):
    (run_dir / LOCK_FILE).mkdir()
    assert refused(run_dir).code.code == "SYS004"
    assert not in_use(run_dir)


@POSIX
def test_a_lock_file_that_leads_elsewhere_is_not_followed(run_dir, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (run_dir / LOCK_FILE).symlink_to(victim)
    assert refused(run_dir).code.code == "SYS004"
    assert victim.read_text() == "precious"
    assert not in_use(run_dir)


@POSIX
def test_a_lock_file_that_is_a_pipe_keeps_nobody_waiting(run_dir):
    os.mkfifo(run_dir / LOCK_FILE)
    started_s = time.monotonic()
    assert not in_use(run_dir)
    hold(run_dir)()
    assert time.monotonic() - started_s < 5


@POSIX
def test_the_disk_may_be_full_when_the_holder_signs(run_dir, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    give_back = hold(run_dir)
    assert in_use(run_dir)
    error = refused(run_dir)
    assert (error.data["pid"], error.data["host"]) == ("?", "?")
    give_back()


HOSTILE = [
    b"",
    b"\0" * 100,
    b"\xff\xfe",
    b"[" * 4000,
    b"null",
    b"[1]",
    b'{"pid": "x", "host": 3, "time": null}',
    b'{"pid": 1e999, "host": "\x1b[2J"}',
    b'{"pid": 99999999999999999999999, "host": "h\\u001b[2J", "time": NaN}',
]


@pytest.mark.parametrize("content", HOSTILE)
def test_a_damaged_lock_file_is_no_lock(run_dir, content):
    (run_dir / LOCK_FILE).write_bytes(content)
    assert not in_use(run_dir)
    assert "\x1b" not in str(holder(run_dir))
    give_back = hold(run_dir)
    assert holder(run_dir)["pid"] == os.getpid()
    give_back()


@given(content=st.binary(max_size=200))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_as_nobody_or_somebody(run_dir, content):
    (run_dir / LOCK_FILE).write_bytes(content)
    assert set(holder(run_dir)) <= {"pid", "host", "time"}


class TestWithoutLocks:
    """A file system that has no locks: the process named in the file is looked for."""

    @pytest.fixture(autouse=True, params=[errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
    def _none(self, monkeypatch, request):
        def no_locks(*_, **__):
            raise OSError(request.param, os.strerror(request.param))

        monkeypatch.setattr(lock, "_take", no_locks)

    def test_a_run_goes_on_and_leaves_no_trace(self, run_dir):
        give_back = hold(run_dir)
        assert in_use(run_dir)
        assert refused(run_dir).data["pid"] == os.getpid()
        give_back()
        assert not in_use(run_dir)
        assert list(run_dir.iterdir()) == []

    def test_a_killed_holder_holds_nothing(self, run_dir):
        with other(run_dir) as process:
            assert in_use(run_dir)
            process.kill()
            assert not in_use(run_dir)
            hold(run_dir)()

    @pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"time": 1.0}, {"pid": -1}, {"pid": 2**80}])
    def test_a_stranger_who_has_the_number_of_the_holder_is_not_the_holder(self, run_dir, change):
        give_back = hold(run_dir)
        record = json.loads((run_dir / LOCK_FILE).read_text())
        (run_dir / LOCK_FILE).write_text(json.dumps({**record, **change}))
        assert not in_use(run_dir)
        give_back()


def test_another_refusal_of_the_disk_is_told(run_dir, monkeypatch):
    def broken(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(lock, "_take", broken)
    assert refused(run_dir).code.code == "SYS004"
    (run_dir / LOCK_FILE).touch()
    assert not in_use(run_dir)


def test_nothing_is_left_open_by_a_refusal(run_dir):
    give_back = hold(run_dir)
    before = os.open(os.devnull, os.O_RDONLY)
    os.close(before)
    for _ in range(3):
        refused(run_dir)
        in_use(run_dir)
    after = os.open(os.devnull, os.O_RDONLY)
    os.close(after)
    assert after == before
    give_back()
