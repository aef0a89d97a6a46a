"""Capsules of strangers: each kind of harm is a clear error, nothing is run, and no memory is taken on their word."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finitune.core.errors import UserError
from finitune.engine.capsule_read import read_capsule
from finitune.engine.capsule_replay import Replay
from finitune.engine.capsule_tensors import BadTensors, read_tensors
from support.capsules import failing, rewrite, sign

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")


class Bomb:
    def __reduce__(self):
        return os.system, ("echo run > /tmp/finitune-capsule-was-run",)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    from finitune.train import plan

    was, plan.measured_flops = plan.measured_flops, lambda *_args, **_kw: 1e9
    try:
        return failing(tmp_path_factory.mktemp("sound")).written()
    finally:
        plan.measured_flops = was


@pytest.fixture
def folder(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "capsule"))


def refused(path, code: str, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        read_capsule(path)
    said = str(caught.value)
    assert caught.value.code.code == code, said
    for word in words:
        assert word in said
    assert "\x1b" not in said
    return said


# ---- what is no capsule ----


def test_what_is_no_capsule_is_said(tmp_path):
    refused(tmp_path / "absent", "SYS410", "nothing at this path")
    refused(tmp_path, "SYS410", "no capsule.json")
    (tmp_path / "file").write_bytes(b"hello" * 500)
    refused(tmp_path / "file", "SYS410", "neither a folder nor a plain tar")
    refused("a\0b", "SYS410")


def test_several_capsules_ask_for_one(sound, tmp_path):
    for name in ("001", "002"):
        shutil.copytree(sound, tmp_path / name / "capsule")
    refused(tmp_path, "SYS410", "2 capsules")


# ---- damage ----


def test_every_file_cut_short_is_named(folder):
    for name in ("tensors.safetensors", "capsule.json", "recipe.yaml"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        refused(folder, "SYS411", name)
        (folder / name).write_bytes(whole)
    assert read_capsule(folder).step == 3


def test_every_file_edited_is_named_with_its_digest(folder):
    for name in ("tensors.safetensors", "capsule.json", "recipe.yaml"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
        refused(folder, "SYS411", name, "digest")
        (folder / name).write_bytes(whole)


def test_every_missing_file_is_named(folder):
    for name in ("tensors.safetensors", "capsule.json", "manifest.json"):
        whole = (folder / name).read_bytes()
        (folder / name).unlink()
        refused(folder, "SYS411", name)
        (folder / name).write_bytes(whole)


def test_a_manifest_that_lists_too_little_is_refused(folder):
    (folder / "tensors.safetensors").unlink()
    sign(folder)
    refused(folder, "SYS411", "tensors.safetensors")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.py", b"import os"),
        ("weights.pt", b"PK\3\4"),
        ("notes.json", pickle.dumps({})),
        ("run.txt", b"#!/bin/sh\n"),
    ],
)
def test_code_and_pickles_are_refused_even_where_they_are_listed(folder, name, content):
    (folder / name).write_bytes(content)
    sign(folder)
    refused(folder, "SYS411", name)


def test_a_pickle_in_the_place_of_the_tensors_is_not_run(folder):
    (folder / "tensors.safetensors").write_bytes(pickle.dumps(Bomb(), protocol=2))
    sign(folder)
    refused(folder, "SYS411", "pickle")
    assert not os.path.exists("/tmp/finitune-capsule-was-run")


@POSIX
@pytest.mark.parametrize("target", ["/etc/passwd", "recipe.yaml", "absent"])
def test_links_are_refused(folder, target):
    (folder / "notes.txt").symlink_to(target)
    refused(folder, "SYS411", "notes.txt")


@POSIX
def test_a_file_that_is_huge_on_paper_is_refused_before_it_is_read(folder):
    with (folder / "tensors.safetensors").open("r+b") as handle:
        handle.truncate(1 << 40)
    refused(folder, "SYS411", "tensors.safetensors", str(1 << 40))


def test_a_json_file_that_is_too_large_is_refused(folder):
    (folder / "capsule.json").write_bytes(b" " * ((16 << 20) + 1))
    refused(folder, "SYS411", "capsule.json")


def test_too_many_files_are_refused(folder):
    for number in range(20):
        (folder / f"{number}.json").write_text("{}")
    sign(folder)
    refused(folder, "SYS411", "files")


# ---- JSON that is signed and wrong ----


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", "null", '{"schema": 2}', '{"schema": true}', "[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000,
     '{"schema": 1}', "9" * 10_000, '{"schema": 1, "step": ' + "[" * 100 + "]" * 100 + "}"],
    ids=range(11),
)  # fmt: skip
def test_json_that_is_no_capsule_is_refused(folder, content):
    (folder / "capsule.json").write_text(content, encoding="utf-8")
    sign(folder)
    refused(folder, "SYS412")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", "NaN"),
        ("step", -1),
        ("step", 1e300),
        ("step", True),
        ("kind", "pickle"),
        ("rows", ["full"]),
        ("weights", None),
        ("trigger", "loss\x1b[2J"),
        ("finding", {"code": 3}),
        ("finding", []),
        ("reading", {"step": 1, "loss": "1.0", "grad_norm": 0}),
        ("reading", {"step": 1, "loss": 1.0}),
        ("expected", {"step": 1, "loss": 1.0, "grad_norm": 1, "amax": []}),
        ("units", [[0, 0, ["no row id"]]]),
        ("units", 7),
        ("units", [[0, "0", []]]),
        ("record", []),
        ("batch", {}),
        ("batch", [{"tensor": "state/absent"}]),
        ("batch", [{"tensor": "batch/0/ids_BT", "shape": [10**12]}]),
        ("delta", {"absent": [2, 2]}),
        ("incident", None),
        ("incident", {"number": "Infinity"}),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(folder, field, value):
    rewrite(folder, lambda info: info.update({field: value}))
    refused(folder, "SYS412", field)


def test_a_field_that_is_absent_is_named(folder):
    for field in ("step", "record", "batch", "incident", "delta", "expected"):
        whole = (folder / "capsule.json").read_text()
        rewrite(folder, lambda info, field=field: info.pop(field))
        refused(folder, "SYS412", field)
        (folder / "capsule.json").write_text(whole)


def test_numbers_that_are_spelt_out_are_numbers_again(folder):
    rewrite(folder, lambda info: info["expected"].update(loss="NaN", grad_norm="Infinity"))
    expected = read_capsule(folder).expected
    assert expected.loss != expected.loss
    assert expected.grad_norm == float("inf")


# ---- tensors ----


def header(path: Path, entries: object, payload: bytes = b"") -> Path:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)
    return path


def entry(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("entries", "payload"),
    [
        ({"x": entry([10**12], [0, 4 * 10**12])}, b"\0" * 8),
        ({"x": entry([10**6, 10**6, 10**6], [0, 8])}, b"\0" * 8),
        ({"x": entry([1 << 61, 8], [0, 0])}, b""),
        ({"x": entry([0, 1 << 60, 1 << 60], [0, 0])}, b""),
        ({"x": entry([2], [0, 8]), "y": entry([2], [4, 12])}, b"\0" * 12),
        ({"x": entry([2], [8, 16])}, b"\0" * 16),
        ({"x": entry([2], [0, 8])}, b"\0" * 9),
        ({"x": entry([2], [0, 8])}, b"\0" * 7),
        ({"x": entry([2], [8, 0])}, b"\0" * 8),
        ({"x": entry([-2], [0, 8])}, b"\0" * 8),
        ({"x": entry([2.0], [0, 8])}, b"\0" * 8),
        ({"x": entry([True], [0, 4])}, b"\0" * 4),
        ({"x": entry("2", [0, 8])}, b"\0" * 8),
        ({"x": entry([2], [0, 8, 9])}, b"\0" * 8),
        ({"x": entry([2], None)}, b"\0" * 8),
        ({"x": entry([2], [0, 8], "OBJECT")}, b"\0" * 8),
        ({"x": entry([2], [0, 8], 4)}, b"\0" * 8),
        ({"x": entry([1] * 40, [0, 4])}, b"\0" * 4),
        ({"x": entry([2], [0, 2], "BOOL")}, b"\2\1"),
        ({"x": 4}, b""),
        ([], b""),
        (b"{", b""),
        (b"\xff\xfe", b""),
        (b"[" * 100_000, b""),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, entries, payload):
    with pytest.raises(BadTensors):
        read_tensors(header(tmp_path / "t", entries, payload))


@pytest.mark.parametrize("content", [b"", b"\0" * 7, struct.pack("<Q", 1 << 63) + b"{}", struct.pack("<Q", 3) + b"{}"])
def test_a_length_that_lies_is_refused(tmp_path, content):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(BadTensors):
        read_tensors(tmp_path / "t")


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=120), st.integers(0, 130))
def test_any_bytes_are_tensors_or_refused(tmp_path_factory, content, length):
    path = tmp_path_factory.mktemp("any") / "t"
    path.write_bytes(struct.pack("<Q", length) + content)
    with contextlib.suppress(BadTensors):
        assert all(isinstance(t, torch.Tensor) for t in read_tensors(path).values())


def test_a_huge_shape_in_a_signed_capsule_is_refused(folder):
    header(folder / "tensors.safetensors", {"state/x": entry([10**12], [0, 4 * 10**12])}, b"\0" * 64)
    sign(folder)
    refused(folder, "SYS413", "4000000000000")


def test_rows_of_a_huge_moment_take_no_memory(folder, monkeypatch):
    from finitune.train.replay_capsule import replay_capsule

    tensors = {"state/m|exp_avg": torch.zeros(1, 4), "places/m|exp_avg": torch.zeros(1, dtype=torch.int64)}
    from finitune.engine.capsule_tensors import write_tensors

    whole = read_tensors(folder / "tensors.safetensors")
    write_tensors(folder / "tensors.safetensors", whole | tensors)
    rewrite(folder, lambda info: info["delta"].update({"m|exp_avg": [10**12, 4]}))
    done = replay_capsule(str(folder))
    assert done.verdict is Replay.IMPOSSIBLE
    assert "m|exp_avg" in done.reason


@pytest.mark.parametrize("places", [[-1], [7], [0, 1]])
def test_rows_outside_of_their_tensor_are_refused(folder, places):
    from finitune.engine.capsule_tensors import write_tensors

    more = {"state/m": torch.zeros(1, 4), "places/m": torch.tensor(places)}
    write_tensors(folder / "tensors.safetensors", read_tensors(folder / "tensors.safetensors") | more)
    rewrite(folder, lambda info: info["delta"].update({"m": [5, 4]}))
    refused(folder, "SYS412", "delta")


# ---- a sound capsule with a foreign state or batch ----


@pytest.mark.parametrize(
    "change",
    [
        lambda info: info["record"].clear(),
        lambda info: info["record"].update(schema=99),
        lambda info: info["record"].update(cursor=[1]),
        lambda info: info["record"].update(conditions={"nonsense": 1}),
        lambda info: info["record"].update(step="Infinity"),
        lambda info: info.update(units=[]),
        lambda info: info.update(units=[[0, 0, []], [0, 0, []]]),
        lambda info: info["state"].update(digest="0" * 32, tensors="AAAA"),
        lambda info: info.update(state=None),
    ],
)
def test_a_foreign_state_or_batch_is_a_verdict(folder, change):
    from finitune.train.replay_capsule import replay_capsule

    rewrite(folder, change)
    done = replay_capsule(str(folder))
    assert done.verdict is Replay.IMPOSSIBLE
    assert done.reason


def test_tokens_beyond_the_vocabulary_are_a_verdict(folder):
    from finitune.engine.capsule_tensors import write_tensors
    from finitune.train.replay_capsule import replay_capsule

    tensors = read_tensors(folder / "tensors.safetensors")
    tensors["batch/0/ids_BT"].fill_(1 << 40)
    write_tensors(folder / "tensors.safetensors", tensors)
    sign(folder)
    done = replay_capsule(str(folder))
    assert done.verdict is Replay.IMPOSSIBLE
    assert "IndexError" in done.reason


def test_a_recipe_that_is_none_is_a_verdict(folder):
    from finitune.train.replay_capsule import replay_capsule

    (folder / "recipe.yaml").write_text("!!python/object/apply:os.system ['echo run']\n")
    sign(folder)
    done = replay_capsule(str(folder))
    assert done.verdict is Replay.IMPOSSIBLE


# ---- archives ----


def tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w") as out:
        for info, content in members:
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize("root", [".", "capsule", "001/capsule"])
def test_a_plain_tar_of_a_capsule_is_read(sound, tmp_path, root):
    with tarfile.open(tmp_path / "a.tar", "w") as out:
        out.add(sound, arcname=root)
    assert read_capsule(tmp_path / "a.tar").step == 3
    assert os.listdir(tmp_path) == ["a.tar"]


@pytest.mark.parametrize(
    ("info", "word"),
    [
        (member("../evil.json"), "leads out"),
        (member("a/../../evil.json"), "leads out"),
        (member("/etc/evil.json"), "leads out"),
        (member("a\\..\\evil.json"), "no name"),
        (member("C:evil.json"), "no name"),
        (member("a\x1b[2J.json"), "no name"),
        (member("a/b/c/d/e/f.json"), "no name"),
        (member("x" * 300), "no name"),
        (member("capsule.json", tarfile.SYMTYPE, "/etc/passwd"), "neither"),
        (member("capsule.json", tarfile.LNKTYPE, "manifest.json"), "neither"),
        (member("capsule.json", tarfile.CHRTYPE), "neither"),
        (member("capsule.json", tarfile.FIFOTYPE), "neither"),
    ],
)
def test_an_archive_that_would_do_harm_is_refused(tmp_path, info, word):
    refused(tar(tmp_path / "a.tar", (info, b"")), "SYS414", word)
    assert os.listdir(tmp_path) == ["a.tar"]


def test_two_members_of_one_name_and_too_many_are_refused(tmp_path):
    refused(tar(tmp_path / "a.tar", (member("a"), b"1"), (member("a"), b"2")), "SYS414", "twice")
    refused(tar(tmp_path / "b.tar", *[(member(f"m{i}"), b"") for i in range(100)]), "SYS414", "members")


def test_a_compressed_archive_is_refused(sound, tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as out:
        out.add(sound, arcname="capsule")
    refused(tmp_path / "a.tar.gz", "SYS410", "plain tar")


def test_a_torn_archive_is_refused(sound, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as out:
        out.add(sound, arcname="capsule")
    whole = (tmp_path / "a.tar").read_bytes()
    for share in (0.1, 0.5, 0.9):
        (tmp_path / "a.tar").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UserError):
            read_capsule(tmp_path / "a.tar")
