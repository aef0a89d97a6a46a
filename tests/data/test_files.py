"""What is wrong with a file is one clear error: what, where, why, what to try."""

from __future__ import annotations

import gzip
import hashlib
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from finitune.core.errors import UserError
from finitune.data.codes import BINARY_FILE, EMPTY_FILE, IS_DIRECTORY, MISSING_FILE, UNKNOWN_TYPE, UNREADABLE
from finitune.data.files import Source, check_file, expand, file_digest, shorten


def fault(path: str | Path) -> UserError:
    found = check_file(str(path))
    assert found is not None
    return found


def test_a_good_file_has_no_fault(write: Callable[..., str]) -> None:
    assert check_file(write("a.jsonl", [{"text": "hi"}])) is None


def test_a_missing_file_names_its_neighbours(write: Callable[..., str], tmp_path: Path) -> None:
    write("train.jsonl", [{}])
    found = fault(tmp_path / "trian.jsonl")
    assert found.code is MISSING_FILE
    assert "Did you mean" in str(found)
    assert "/train.jsonl?" in str(found)


def test_a_missing_folder_names_the_near_folder(tmp_path: Path) -> None:
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "a.jsonl").write_text("{}")
    assert "datasets/a.jsonl?" in str(fault(tmp_path / "dataset" / "a.jsonl"))


def test_a_missing_file_with_no_near_name_lists_the_data_files(write: Callable[..., str], tmp_path: Path) -> None:
    write("xyz.parquet", b"PAR1")
    assert "xyz.parquet" in str(fault(tmp_path / "a-quite-different-name.json"))


def test_a_folder_lists_what_is_in_it(write: Callable[..., str], tmp_path: Path) -> None:
    write("b.jsonl", [{}])
    write("a.json", [{}])
    write("notes.md", "x")
    found = fault(tmp_path)
    assert found.code is IS_DIRECTORY
    assert found.data["files"] == "a.json, b.jsonl"
    assert f"{tmp_path.as_posix()}/*.jsonl" in str(found)


def test_an_empty_file(write: Callable[..., str]) -> None:
    assert fault(write("a.jsonl", "")).code is EMPTY_FILE


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (gzip.compress(b'{"text": "hi"}'), "gzip"),
        (b"PK\x03\x04rest", "zip"),
        (b"\x28\xb5\x2f\xfdrest", "compressed"),
        (b"PAR1rest", "parquet"),
        ('{"text": "hi"}'.encode("utf-16"), "UTF-16"),
        (b'{"text": "a\x00b"}', "NUL"),
        (b"\x89PNG\r\n", "image"),
        (b"%PDF-1.7", "PDF"),
        (b"\x80\x04\x95rest", "pickle"),
    ],
)
def test_a_file_that_is_no_text_says_what_it_is(write: Callable[..., str], content: bytes, kind: str) -> None:
    found = fault(write("a.jsonl", content))
    assert found.code is BINARY_FILE
    assert kind in found.data["kind"]
    assert found.data["cure"] in str(found)


def test_a_real_zip_is_recognised(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.json", "w") as archive:
        archive.writestr("x", "y")
    assert fault(tmp_path / "a.json").code is BINARY_FILE


def test_parquet_is_binary_only_under_another_name(write: Callable[..., str]) -> None:
    assert check_file(write("a.parquet", b"PAR1rest")) is None


def test_an_unknown_ending_lists_the_known_ones(write: Callable[..., str]) -> None:
    found = fault(write("a.csv", "a,b"))
    assert found.code is UNKNOWN_TYPE
    assert ".jsonl" in found.data["known"]


def test_an_impossible_name_is_missing() -> None:
    assert fault("a\0b.jsonl").code is MISSING_FILE


def test_an_unreadable_file(write: Callable[..., str]) -> None:
    path = write("a.jsonl", [{}])
    os.chmod(path, 0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert fault(path).code is UNREADABLE


def test_patterns_are_replaced_by_their_files_in_order(write: Callable[..., str], tmp_path: Path) -> None:
    paths = [write(n, [{}]) for n in ("b.jsonl", "a.jsonl")]
    (tmp_path / "folder.jsonl").mkdir()
    assert [s.path for s in expand(f"{tmp_path}/*.jsonl")] == sorted(paths)


def test_a_pattern_without_a_match_stays_to_be_reported(tmp_path: Path) -> None:
    pattern = f"{tmp_path}/*.jsonl"
    assert expand(pattern) == [Source(pattern)]
    assert fault(pattern).code is MISSING_FILE


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(write: Callable[..., str]) -> None:
    path = write("rows[1].jsonl", [{}])
    assert expand(path) == [Source(path)]


def test_all_ways_to_name_sources() -> None:
    assert expand("a.jsonl") == expand(Path("a.jsonl")) == expand(["a.jsonl"]) == [Source("a.jsonl")]
    assert expand({"a.jsonl": "text", "b.json": "alpaca"}) == [Source("a.jsonl", "text"), Source("b.json", "alpaca")]
    assert expand([Source("t.txt", unit="file"), "b.json"]) == [Source("t.txt", unit="file"), Source("b.json")]


def test_file_digest_is_sha256_of_the_whole(write: Callable[..., str]) -> None:
    content = b"x" * (1 << 20) + b"tail"
    assert file_digest(write("a.txt", content)) == hashlib.sha256(content).hexdigest()


def test_shorten_counts_what_it_leaves_out() -> None:
    assert shorten([]) == "none"
    assert shorten(["a", "b"]) == "a, b"
    assert shorten(["a", "b", "c"], 2) == "a, b (and 1 more)"
