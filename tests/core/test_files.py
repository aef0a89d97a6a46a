"""Files are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finitune.core import files


def test_write_atomic_replaces_the_whole_content(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file"
    files.write_atomic(target, b"old and long")
    files.write_atomic(target, b"new")
    assert target.read_bytes() == b"new"
    assert [p.name for p in target.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_content_and_no_litter(tmp_path, monkeypatch, operation) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def fail(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, operation, fail)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_atomic_folder_appears_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with files.atomic_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_atomic_folder_that_fails_keeps_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with files.atomic_folder(target) as folder:
        (folder / "a").write_text("old")

    def write_half() -> None:
        with files.atomic_folder(target) as folder:
            (folder / "a").write_text("new")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        write_half()
    assert (target / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_atomic_folder_whose_rename_fails_puts_the_old_one_back(tmp_path, monkeypatch) -> None:
    target = tmp_path / "out"
    with files.atomic_folder(target) as folder:
        (folder / "a").write_text("old")
    real, calls = os.rename, []

    def second_fails(source: object, destination: object) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        real(source, destination)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="Input/output"), files.atomic_folder(target) as folder:
        (folder / "a").write_text("new")
    assert (target / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(b"abcdef")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "state").write_bytes(b"123")
    files.write_manifest(tmp_path, {"step": 7})
    return tmp_path


def test_a_sealed_folder_verifies_and_keeps_its_facts(sealed: Path) -> None:
    assert files.verify_manifest(sealed) == []
    assert files.read_manifest(sealed)["step"] == 7


def test_every_kind_of_damage_is_named(sealed: Path) -> None:
    (sealed / "weights").write_bytes(b"abcdeg")
    assert files.verify_manifest(sealed) == ["weights: content differs from its digest"]
    (sealed / "weights").write_bytes(b"abc")
    assert files.verify_manifest(sealed) == ["weights: 3 bytes, expected 6"]
    (sealed / "weights").unlink()
    assert files.verify_manifest(sealed) == ["weights: missing"]
    (sealed / "manifest.json").write_text("{")
    assert files.verify_manifest(sealed)[0].startswith("manifest.json:")


def test_a_manifest_cannot_point_outside_its_folder(sealed: Path) -> None:
    files.write_atomic(sealed / "manifest.json", b'{"files": {"../x": {"bytes": 1, "sha256": "0"}}}')
    assert files.verify_manifest(sealed) == ["../x: points outside the folder"]


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
