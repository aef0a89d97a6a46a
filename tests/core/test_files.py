"""Files are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finitune.core import files

posix = pytest.mark.skipif(sys.platform == "win32", reason="the system's calls differ there")
# Newer Pythons warn of forks beside threads; the children here do nothing but write files and leave.
forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
REFUSALS = (errno.ENOSPC, errno.EIO)
REAL = {name: getattr(os, name) for name in ("write", "fsync", "replace", "rename", "open", "mkdir", "close", "unlink")}


class Faults:
    """Makes the n-th call of a system function fail, or every one from then on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.calls: list[str] = []

    def watch(self) -> None:
        for name in REAL:
            self._monkeypatch.setattr(os, name, self._calling(name, lambda _: None))

    def at(self, place: int, refusal: int, *, stays: bool = False) -> None:
        def refuse(count: int) -> None:
            if count == place or (stays and count > place):
                raise OSError(refusal, os.strerror(refusal))

        for name in REAL:
            # What cannot be opened, closed or removed any more is another story than a disk that takes nothing.
            harmless = name in ("close", "unlink", "open")
            self._monkeypatch.setattr(os, name, self._calling(name, (lambda _: None) if harmless and stays else refuse))

    def _calling(self, name: str, before: Callable[[int], None]) -> Callable[..., Any]:
        def call(*arguments: Any, **names: Any) -> Any:
            self.calls.append(name)
            before(len(self.calls))
            return REAL[name](*arguments, **names)

        return call


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    with monkeypatch.context() as patch:
        yield Faults(patch)


def refused_with(work: Callable[[], None]) -> int | None:
    """The system's number of the refusal that ``work`` tells; None where all went well."""
    try:
        work()
    except OSError as error:
        return error.errno
    return None


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ---- one file ----


def test_write_atomic_replaces_the_whole_content(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file"
    files.write_atomic(target, b"old and long")
    files.write_atomic(target, b"new")
    assert target.read_bytes() == b"new"
    assert names(target.parent) == ["file"]
    files.write_atomic(target, b"")
    assert target.read_bytes() == b""


def calls_of(faults: Faults, work: Callable[[], None]) -> int:
    faults.watch()
    work()
    count, faults.calls = len(faults.calls), []
    return count


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_a_file_whose_writing_fails_anywhere_is_the_old_or_the_new(tmp_path, faults, refusal, stays, there) -> None:
    """Every call of the system is refused once: open, write, fsync, close, rename, open and fsync of the folder."""
    target, new = tmp_path / "file", b"new" * 1000
    target.write_bytes(b"old")
    count = calls_of(faults, lambda: files.write_atomic(target, new))
    assert count >= 8
    seen = set()
    for place in range(1, count + 1):
        target.write_bytes(b"old") if there else target.unlink(missing_ok=True)
        faults.calls = []
        faults.at(place, refusal, stays=stays)
        assert refused_with(lambda: files.write_atomic(target, new)) in (None, refusal)
        faults.watch()
        seen.add(target.read_bytes() if target.exists() else None)
        assert names(tmp_path) in (["file"], [])
    assert seen == {b"old" if there else None, new}


def test_a_file_is_written_whole_by_short_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", lambda descriptor, content: REAL["write"](descriptor, content[:7]))
    files.write_atomic(tmp_path / "file", bytes(range(256)))
    assert (tmp_path / "file").read_bytes() == bytes(range(256))


def test_a_system_that_takes_no_byte_is_a_refusal_and_no_endless_loop(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "write", lambda *_: 0)
    with pytest.raises(OSError, match="took no byte"):
        files.write_atomic(tmp_path / "file", b"new")
    assert names(tmp_path) == []


def test_where_only_the_last_flush_is_refused_the_new_content_stands_and_it_is_told(tmp_path, monkeypatch) -> None:
    target, calls = tmp_path / "file", []
    target.write_bytes(b"old")

    def second_fails(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", second_fails)
    with pytest.raises(OSError, match="Input/output"):
        files.write_atomic(target, b"new")
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_flush_folders_is_no_fault(tmp_path, monkeypatch, number: int) -> None:
    def no_folders(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", no_folders)
    files.write_atomic(tmp_path / "file", b"x")
    with files.atomic_folder(tmp_path / "folder") as folder:
        (folder / "sub").mkdir()


def test_an_interrupt_leaves_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(tmp_path / "file", b"new")
    assert names(tmp_path) == []


@posix
@forks
def test_a_limit_that_the_system_enforces_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    child = os.fork()
    if not child:  # pragma: no cover
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            files.write_atomic(tmp_path / "file", b"x" * 5000)
        except OSError as error:
            os._exit(42 if error.errno == errno.EFBIG else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


# ---- a folder ----


def fill(folder: Path, content: str) -> None:
    (folder / "a").write_text(content)
    (folder / "sub").mkdir()
    (folder / "sub" / "b").write_text(content)


def held(folder: Path) -> str | None:
    """What both files hold; None where there is no folder."""
    if not folder.exists():
        return None
    assert (folder / "a").read_text() == (folder / "sub" / "b").read_text()
    return (folder / "a").read_text()


def test_atomic_folder_appears_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with files.atomic_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert names(tmp_path) == ["out"]


def test_atomic_folder_that_fails_keeps_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with files.atomic_folder(target) as folder:
        fill(folder, "old")

    def write_half() -> None:
        with files.atomic_folder(target) as folder:
            (folder / "a").write_text("new")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        write_half()
    assert held(target) == "old"
    assert names(tmp_path) == ["out"]


def replace_folder(target: Path) -> None:
    with files.atomic_folder(target) as folder:
        # As another library writes: past the functions that fail here.
        for name in ("a", "sub/b"):
            (folder / name).parent.mkdir(exist_ok=True)
            with open(folder / name, "w") as handle:
                handle.write("new")


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("there", [False, True])
def test_a_folder_whose_writing_fails_anywhere_is_the_old_or_the_new(tmp_path, faults, refusal, there) -> None:
    """Every call of the system is refused once; nothing is left behind."""
    target = tmp_path / "out"

    def begin() -> None:
        shutil.rmtree(target, ignore_errors=True)
        if there:
            target.mkdir()
            fill(target, "old")

    begin()
    count = calls_of(faults, lambda: replace_folder(target))
    seen = set()
    for place in range(1, count + 1):
        faults.watch()
        begin()
        faults.calls = []
        faults.at(place, refusal)
        told = refused_with(lambda: replace_folder(target))
        assert told in (None, refusal)
        faults.watch()
        seen.add(held(target))
        # Where all went well but the removal of the old one, that is left to sweep.
        assert names(tmp_path) in (["out"], []) or (told is None and held(target) == "new")
        files.sweep(tmp_path)
        assert names(tmp_path) in (["out"], [])
    assert seen == {"old" if there else None, "new"}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_disk_that_fails_for_good_in_the_middle_of_a_swap_keeps_the_old_folder(tmp_path, faults, refusal) -> None:
    """From some call on nothing is taken: where the old one cannot be put back, it is whole aside and sweep does it."""
    target = tmp_path / "out"
    target.mkdir()
    fill(target, "old")
    count = calls_of(faults, lambda: replace_folder(target))
    aside = 0
    for place in range(1, count + 1):
        shutil.rmtree(target)
        target.mkdir()
        fill(target, "old")
        faults.calls = []
        faults.at(place, refusal, stays=True)
        assert refused_with(lambda: replace_folder(target)) in (None, refusal)
        faults.watch()
        aside += not target.exists()
        files.sweep(tmp_path)
        assert held(target) in ("old", "new")
        assert names(tmp_path) == ["out"]
    assert aside == 1


def test_the_new_folder_is_on_the_disk_before_the_old_one_goes(tmp_path: Path, faults: Faults) -> None:
    target = tmp_path / "out"
    target.mkdir()
    fill(target, "old")
    faults.watch()
    replace_folder(target)
    renames = [i for i, name in enumerate(faults.calls) if name == "rename"]
    after = faults.calls[renames[1] + 1 :]
    assert "fsync" in after
    assert after.index("fsync") < after.index("unlink")
    flushed = faults.calls[: renames[0]].count("fsync")
    assert flushed == 4  # two files, two folders


@posix
@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_whatever_stands_at_the_name_is_replaced_and_what_a_link_leads_to_is_kept(tmp_path: Path, kind: str) -> None:
    target, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    fill(elsewhere, "kept")
    if kind == "file":
        target.write_text("file")
    else:
        target.symlink_to("absent" if kind == "dangling link" else "elsewhere", target_is_directory=True)
    replace_folder(target)
    assert not target.is_symlink()
    assert held(target) == "new"
    assert held(elsewhere) == "kept"
    assert names(tmp_path) == ["elsewhere", "out"]


def test_a_full_disk_in_the_words_of_another_library_is_an_os_error(tmp_path: Path) -> None:
    def write() -> None:
        with files.atomic_folder(tmp_path / "out"):
            raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left") as caught:
        write()
    assert caught.value.errno == 28
    assert list(tmp_path.iterdir()) == []


def test_files_and_folders_have_the_rights_that_the_umask_gives(tmp_path: Path) -> None:
    files.write_atomic(tmp_path / "file", b"x")
    (tmp_path / "plain").write_bytes(b"x")
    with files.atomic_folder(tmp_path / "folder"):
        pass
    (tmp_path / "plain folder").mkdir()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "plain folder").stat().st_mode


# ---- what killed writers leave ----


@posix
@forks
def test_whatever_call_a_writer_is_killed_at_sweep_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    target = tmp_path / "out"
    seen, place = set(), 0
    while True:
        place += 1
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        fill(target, "old")
        child = os.fork()
        if not child:  # pragma: no cover
            _die_at(place)
            replace_folder(target)
            os._exit(0)
        finished = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        files.sweep(tmp_path)
        seen.add(held(target))
        assert names(tmp_path) == ["out"]
        if finished:
            break
    assert place > 15
    assert seen == {"old", "new"}


def _die_at(place: int) -> None:  # pragma: no cover
    calls = []

    def dying(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            calls.append(name)
            if len(calls) == place:
                os._exit(9)
            return REAL[name](*arguments, **keywords)

        return call

    for name in REAL:
        setattr(os, name, dying(name))


def test_sweep_says_what_it_did_and_touches_nothing_else(tmp_path: Path) -> None:
    kept = [
        "checkpoint-1",
        ".lock",
        "a.tmp",
        ".b.tmp",
        ".c.12-0123abcd.tmp.bak",
        "d.12-0123abcd.old",
        ".e.x-0123abcd.tmp",
    ]
    for name in kept:
        (tmp_path / name).touch()
    (tmp_path / ".final.12-0123abcd.tmp").mkdir()
    (tmp_path / ".final.12-0123abcd.tmp" / "half").touch()
    (tmp_path / ".trusted.json.7-00000000.tmp").touch()
    (tmp_path / ".checkpoint-1.12-0123abcd.old").mkdir()
    (tmp_path / ".checkpoint-2.12-0123abcd.old").mkdir()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / ".f.12-0123abcd.tmp").touch()
    done = files.sweep(tmp_path)
    assert names(tmp_path) == sorted([*kept, "checkpoint-2", "sub"])
    assert names(tmp_path / "sub") == [".f.12-0123abcd.tmp"]
    assert sorted(done) == [
        ".checkpoint-1.12-0123abcd.old: left behind by a writer that was killed; removed",
        ".final.12-0123abcd.tmp: left behind by a writer that was killed; removed",
        ".trusted.json.7-00000000.tmp: left behind by a writer that was killed; removed",
        "checkpoint-2: put back; the writer of its replacement was killed",
    ]
    assert files.sweep(tmp_path) == []


def test_of_several_old_ones_the_newest_is_put_back(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        (tmp_path / f"{number}").touch()
        os.rename(tmp_path / f"{number}", tmp_path / f".out.{number}-00000000.old")
        (tmp_path / f".out.{number}-00000000.old").write_text(str(number))
        os.utime(tmp_path / f".out.{number}-00000000.old", (9 - number, 9 - number))
    files.sweep(tmp_path)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_text() == "3"


@posix
def test_sweep_removes_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious").touch()
    (tmp_path / ".out.1-00000000.tmp").symlink_to("data", target_is_directory=True)
    files.sweep(tmp_path)
    assert names(tmp_path) == ["data"]
    assert names(tmp_path / "data") == ["precious"]


def test_what_sweep_cannot_do_is_said_and_not_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".a.1-00000000.tmp").touch()
    (tmp_path / ".b.1-00000000.old").touch()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "unlink", refuse)
    monkeypatch.setattr(os, "rename", refuse)
    done = files.sweep(tmp_path)
    assert len(done) == 2
    assert all("cannot be removed or put back (Read-only file system)" in sentence for sentence in done)
    assert files.sweep(tmp_path / "absent") == []
