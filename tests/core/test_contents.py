"""Folders are looked at without trusting them."""

from __future__ import annotations

import json
import os
import pickle
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finitune.core.contents import ALLOWED_SUFFIXES, shown, suspicion, walk

posix = pytest.mark.skipif(sys.platform == "win32", reason="links and pipes need rights there")


def refused(path: Path, content: bytes) -> bool:
    path.write_bytes(content)
    return suspicion(path.name, path) is not None


@pytest.mark.parametrize("suffix", sorted(ALLOWED_SUFFIXES))
def test_ordinary_files_are_not_suspected(tmp_path: Path, suffix: str) -> None:
    for content in (b"", b"{}", b"#version: 0.2\n", b"# Title\n", b"MZ\n", b"text", "caf\u00e9".encode()):
        assert not refused(tmp_path / f"file{suffix}", content)


@pytest.mark.parametrize(
    "name",
    ["x.bin", "x.pt", "x.pth", "x.pkl", "x.ckpt", "x.npy", "x.py", "x.so", "x.sh", "x.PT", "x.json.pkl", "x", ".x"],
)
def test_files_of_other_kinds_are_refused_by_their_name(tmp_path: Path, name: str) -> None:
    assert refused(tmp_path / name, b"{}")


def test_kinds_are_known_in_any_case(tmp_path: Path) -> None:
    assert not refused(tmp_path / "README.MD", b"text")


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("suffix", [".json", ".safetensors", ".model"])
def test_a_pickle_under_a_good_name_is_refused(tmp_path: Path, protocol: int, suffix: str) -> None:
    assert refused(tmp_path / f"x{suffix}", pickle.dumps({"a": [1.5] * 10}, protocol))


def test_a_zip_under_a_good_name_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.safetensors", "w") as archive:
        archive.writestr("data.pkl", b"x")
    assert suspicion("model.safetensors", tmp_path / "model.safetensors") is not None
    zipfile.ZipFile(tmp_path / "empty.json", "w").close()
    assert suspicion("empty.json", tmp_path / "empty.json") is not None


@pytest.mark.parametrize(
    "content",
    [
        b"#!/bin/sh\n",
        b"\x7fELF\x02\x01",
        b"MZ\x90\x00",
        b"\xcf\xfa\xed\xfe",
        b"\x93NUMPY\x01",
        b"\x1f\x8b\x08",
        b"BZh91AY&SY",
    ],
)
def test_programs_arrays_and_archives_under_a_good_name_are_refused(tmp_path: Path, content: bytes) -> None:
    assert refused(tmp_path / "x.txt", content)


@settings(deadline=None)
@given(st.integers(2, 100_000))
def test_no_safetensors_header_of_any_length_is_taken_for_a_pickle(tmp_path_factory, length: int) -> None:
    """Of 640 bytes, say: the file begins with 80 02, as a pickle of protocol 2 does."""
    header = json.dumps({"__metadata__": {"format": "pt"}}).encode().ljust(length)
    path = tmp_path_factory.getbasetemp() / "x.safetensors"
    assert not refused(path, len(header).to_bytes(8, "little") + header)
    assert not refused(path, (640).to_bytes(8, "little") + b"{")


def test_walk_gives_the_plain_files_below(tmp_path: Path) -> None:
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "sub" / "deep" / "a.json").touch()
    (tmp_path / "b.json").touch()
    files, faults = walk(tmp_path)
    assert sorted(files) == ["b.json", "sub/deep/a.json"]
    assert files["b.json"] == tmp_path / "b.json"
    assert faults == []


@posix
def test_walk_names_links_pipes_and_what_leads_nowhere_and_opens_none(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    (folder / "real.json").touch()
    (folder / "inside.json").symlink_to("real.json")
    (folder / "outside.json").symlink_to(tmp_path / "secret")
    (folder / "nowhere.json").symlink_to("absent")
    (folder / "loop.json").symlink_to("loop.json")
    (folder / "up").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(folder / "pipe.json")
    files, faults = walk(folder)
    assert sorted(files) == ["inside.json", "real.json"]
    assert sorted(faults) == [
        "loop.json: a link that leads nowhere",
        "nowhere.json: a link that leads nowhere",
        "outside.json: points outside the folder",
        "pipe.json: neither a file nor a folder",
        "up: a link to a folder",
    ]


def test_walk_of_no_folder_says_so(tmp_path: Path) -> None:
    files, faults = walk(tmp_path / "absent")
    assert files == {}
    assert faults == [".: cannot be read (No such file or directory)"]


@given(st.text(st.characters(codec=None)))
def test_a_shown_name_can_be_printed_and_holds_no_control_character(name: str) -> None:
    assert shown(name).isprintable()
    shown(name).encode("utf-8")
