"""A folder agrees with its manifest, or every fault is named; nothing is opened that is not its own."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from finitune.core import files

posix = pytest.mark.skipif(sys.platform == "win32", reason="the system's calls differ there")


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    (tmp_path / "weights.safetensors").write_bytes(b"abcdef")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "state.json").write_bytes(b"123")
    files.write_manifest(tmp_path, {"step": 7, "facts": {"rate": 1e-05, "name": "caf\u00e9"}})
    return tmp_path


def test_a_sealed_folder_verifies_and_keeps_its_facts(sealed: Path) -> None:
    assert files.verify_manifest(sealed) == []
    assert files.read_manifest(sealed)["step"] == 7


def test_every_kind_of_damage_to_a_file_is_named(sealed: Path) -> None:
    weights = sealed / "weights.safetensors"
    weights.write_bytes(b"abcdeg")
    assert files.verify_manifest(sealed) == ["weights.safetensors: content differs from its digest"]
    weights.write_bytes(b"abc")
    assert files.verify_manifest(sealed) == ["weights.safetensors: 3 bytes, expected 6"]
    weights.unlink()
    assert files.verify_manifest(sealed) == ["weights.safetensors: missing"]
    weights.mkdir()
    assert files.verify_manifest(sealed) == ["weights.safetensors: missing"]


def test_all_faults_are_named_at_once(sealed: Path) -> None:
    (sealed / "weights.safetensors").write_bytes(b"abc")
    (sealed / "sub" / "state.json").unlink()
    (sealed / "stranger.json").touch()
    (sealed / "evil.pkl").touch()
    assert sorted(files.verify_manifest(sealed)) == [
        "evil.pkl: does not belong here, the manifest does not list it",
        "evil.pkl: refused, a file of this kind may hold code or a pickle",
        "stranger.json: does not belong here, the manifest does not list it",
        "sub/state.json: missing",
        "weights.safetensors: 3 bytes, expected 6",
    ]


def test_files_that_may_stand_beside_are_no_strangers_but_looked_at(sealed: Path) -> None:
    (sealed / "trusted.json").write_text("{}")
    assert files.verify_manifest(sealed, beside=("trusted.json",)) == []
    assert len(files.verify_manifest(sealed)) == 1
    (sealed / "trusted.json").write_bytes(b"\x80\x04pickle")
    assert files.verify_manifest(sealed, beside=("trusted.json",)) == [
        "trusted.json: refused, its content begins like a pickle"
    ]
    assert files.verify_manifest(sealed, beside=("absent.json",)) != []


def test_half_of_an_allowed_file_and_litter_of_file_managers_condemn_nothing(sealed: Path) -> None:
    """A run killed while it marks a checkpoint as trusted shall not lose that checkpoint."""
    (sealed / ".trusted.json.12-0123abcd.tmp").write_text("{")
    (sealed / ".manifest.json.12-0123abcd.tmp").write_text("{")
    (sealed / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    assert files.verify_manifest(sealed, beside=("trusted.json",)) == []
    (sealed / ".trusted.json.12-0123abcd.tmp").write_bytes(b"PK\x03\x04")
    (sealed / ".weights.pkl.12-0123abcd.tmp").write_text("{")
    assert len(files.verify_manifest(sealed, beside=("trusted.json",))) == 3


def test_a_listed_pickle_is_refused_although_its_digest_agrees(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    (tmp_path / "model.safetensors").write_bytes(b"PK\x03\x04")
    files.write_manifest(tmp_path, {})
    assert sorted(files.verify_manifest(tmp_path)) == [
        "model.bin: refused, a file of this kind may hold code or a pickle",
        "model.safetensors: refused, its content begins like a zip archive, as pickled tensors are stored in",
    ]


@posix
def test_links_are_followed_inside_only(sealed: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "weights.safetensors"
    weights = sealed / "weights.safetensors"
    shutil.move(weights, outside)
    weights.symlink_to(outside)
    assert sorted(files.verify_manifest(sealed)) == [
        "weights.safetensors: missing",
        "weights.safetensors: points outside the folder",
    ]
    weights.unlink()
    (sealed / "weights.safetensors").symlink_to("sub/state.json")
    assert files.verify_manifest(sealed) == ["weights.safetensors: 3 bytes, expected 6"]


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_cannot_be_read_is_named(sealed: Path) -> None:
    (sealed / "weights.safetensors").chmod(0)
    assert any("cannot be read" in fault for fault in files.verify_manifest(sealed))


def test_a_disk_that_fails_while_reading_is_named(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "file_digest", fail)
    assert "weights.safetensors: cannot be read (Input/output error)" in files.verify_manifest(sealed)


# ---- the manifest itself ----


def accepted(written: bytes) -> dict[str, Any] | None:
    """The manifest; None where it is refused."""
    try:
        return files._manifest_of(written)
    except ValueError:
        return None


def test_any_changed_bit_of_a_manifest_is_found(sealed: Path) -> None:
    whole = (sealed / files.MANIFEST).read_bytes()
    record = json.loads(whole)
    for place in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[place // 8] ^= 1 << place % 8
        # Where it passes, it is another way to write the same, as 1E-05 for 1e-05.
        assert accepted(bytes(changed)) in (None, record), place


@pytest.mark.parametrize("place", [0, 20, 100, 300])
def test_a_changed_manifest_is_named(sealed: Path, place: int) -> None:
    path = sealed / files.MANIFEST
    changed = bytearray(path.read_bytes())
    changed[place] ^= 64
    path.write_bytes(changed)
    (fault,) = files.verify_manifest(sealed)
    assert fault.startswith("manifest.json: ")
    with pytest.raises(ValueError, match=r"changed|manifest|entry"):
        files.read_manifest(sealed)


def test_a_manifest_cut_anywhere_is_named(sealed: Path) -> None:
    path = sealed / files.MANIFEST
    whole = path.read_bytes()
    assert all(accepted(whole[:kept]) is None for kept in range(len(whole)))
    path.write_bytes(whole[:-1])
    (fault,) = files.verify_manifest(sealed)
    assert fault.startswith("manifest.json: not JSON, cut short or changed")
    path.unlink()
    assert files.verify_manifest(sealed) == ["manifest.json: missing"]
    with pytest.raises(FileNotFoundError):
        files.read_manifest(sealed)


def test_the_digest_of_the_manifest_is_that_of_its_canonical_json(sealed: Path) -> None:
    import hashlib

    record = json.loads((sealed / files.MANIFEST).read_text())
    own = record.pop("self")
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"))
    assert own == hashlib.sha256(canonical.encode()).hexdigest()
    (sealed / files.MANIFEST).write_text(json.dumps({"self": own, **record}))
    assert files.verify_manifest(sealed) == [], "how it is laid out does not matter"


def test_a_manifest_that_was_exchanged_or_edited_is_named(sealed: Path) -> None:
    path = sealed / files.MANIFEST
    path.write_text(path.read_text().replace('"step": 7', '"step": 8'))
    assert files.verify_manifest(sealed) == ["manifest.json: changed after it was written: its own digest differs"]


def forge(folder: Path, record: Any) -> None:
    """A manifest of any content whose own digest agrees."""
    if isinstance(record, dict):
        record = record | {"self": files._self_digest(record)}
    (folder / files.MANIFEST).write_text(json.dumps(record))


GOOD = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "record",
    [
        None, 3, [], "x", {}, {"schema": 2}, {"files": {}}, {"schema": 2, "files": []}, {"schema": "2", "files": {}},
        {"schema": True, "files": {}}, {"schema": 3, "files": {}}, {"schema": 2.0, "files": {}},
        {"schema": None, "files": {}},
        {"schema": 2, "files": {"a": None}}, {"schema": 2, "files": {"a": []}}, {"schema": 2, "files": {"a": {}}},
        {"schema": 2, "files": {"a": GOOD | {"bytes": -1}}}, {"schema": 2, "files": {"a": GOOD | {"bytes": True}}},
        {"schema": 2, "files": {"a": GOOD | {"bytes": "1"}}}, {"schema": 2, "files": {"a": GOOD | {"bytes": 1.0}}},
        {"schema": 2, "files": {"a": GOOD | {"sha256": 5}}}, {"schema": 2, "files": {"a": GOOD | {"sha256": "xyz"}}},
        {"schema": 2, "files": {"a": GOOD | {"sha256": "A" * 64}}},
    ],
)  # fmt: skip
def test_what_has_not_the_shape_of_a_manifest_is_named(tmp_path: Path, record: Any) -> None:
    forge(tmp_path, record)
    (fault,) = files.verify_manifest(tmp_path)
    assert fault.startswith("manifest.json: ")
    with pytest.raises(ValueError, match=r"manifest|entry|schema"):
        files.read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("../x.json", "points outside the folder"), ("/etc/passwd", "points outside the folder"), ("", "missing"),
        (".", "missing"), ("a/../../b.json", "points outside the folder"), ("a\0b", "missing"), ("\ud800", "missing"),
        ("x" * 5000, "missing"), ("a\nb\x1b[31m", "missing"), ("sub", "missing"), ("{name}", "missing"),
    ],
)  # fmt: skip
def test_any_name_in_a_manifest_is_met_without_opening_it(sealed: Path, name: str, fault: str) -> None:
    record = json.loads((sealed / files.MANIFEST).read_text())
    record["files"][name] = GOOD
    forge(sealed, record)
    (found,) = files.verify_manifest(sealed)
    assert found.endswith(f": {fault}")
    assert found.isprintable()


def test_absurd_sizes_are_met(sealed: Path) -> None:
    record = json.loads((sealed / files.MANIFEST).read_text())
    record["files"]["weights.safetensors"]["bytes"] = 10**400
    forge(sealed, record)
    (fault,) = files.verify_manifest(sealed)
    assert fault.startswith("weights.safetensors: 6 bytes, expected 1000")
    for content in (
        b'{"schema": ' + b"9" * 5000 + b"}",
        b"[" * 200_000,
        b"\xff\xfe",
        b"",
        b'{"a": 1e999, "schema": NaN}',
    ):
        (sealed / files.MANIFEST).write_bytes(content)
        (fault,) = files.verify_manifest(sealed)
        assert fault.startswith("manifest.json: ")


def test_a_manifest_that_is_too_long_is_not_read(sealed: Path) -> None:
    with (sealed / files.MANIFEST).open("r+b") as handle:
        handle.truncate(1 << 40)  # a hole: it takes no space
    (fault,) = files.verify_manifest(sealed)
    assert "too many for a manifest" in fault


@posix
def test_a_pipe_for_a_manifest_blocks_nobody(sealed: Path) -> None:
    (sealed / files.MANIFEST).unlink()
    os.mkfifo(sealed / files.MANIFEST)
    assert sorted(files.verify_manifest(sealed)) == [
        "manifest.json: missing",
        "manifest.json: neither a file nor a folder",
    ]


def test_a_manifest_of_schema_1_is_read(sealed: Path) -> None:
    record = json.loads((sealed / files.MANIFEST).read_text())
    del record["self"]
    (sealed / files.MANIFEST).write_text(json.dumps(record | {"schema": 1}))
    assert files.verify_manifest(sealed) == []
    (sealed / files.MANIFEST).write_text(json.dumps(record))
    assert files.verify_manifest(sealed) != []


@posix
def test_what_is_no_plain_file_cannot_be_sealed(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match=r"link.json: points outside"):
        files.write_manifest(tmp_path, {})


def test_no_folder_is_a_fault_and_no_exception(tmp_path: Path) -> None:
    assert files.verify_manifest(tmp_path / "absent")[0] == "manifest.json: missing"
    (tmp_path / "file").touch()
    assert files.verify_manifest(tmp_path / "file")[0] == "manifest.json: missing"
