"""``finitune replay``: the verdict, its exit code, and what it refuses."""

from __future__ import annotations

import tarfile
from dataclasses import replace

import pytest

from finitune.cli import main as program
from support.capsules import failing


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    if "replay" not in program.COMMANDS:
        monkeypatch.setattr(program, "COMMANDS", (*program.COMMANDS, "incidents", "replay"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    from finitune.train import plan

    was, plan.measured_flops = plan.measured_flops, lambda *_args, **_kw: 1e9
    try:
        return failing(tmp_path_factory.mktemp("made"))
    finally:
        plan.measured_flops = was


def test_a_capsule_that_reproduces_is_a_finding(cli, made) -> None:
    done = cli("replay", str(made.written().parent))
    assert done.code == 1
    assert "Incident 1, step 3: reproduces bit for bit" in done.out
    assert "逐位重现" in cli("replay", str(made.written()), "--lang", "zh").out


def test_other_bits_of_the_same_failure_reproduce(cli, made) -> None:
    other = replace(made, case=replace(made.case, reading=replace(made.case.reading, loss=99.0)))
    done = cli("replay", str(other.written("other")))
    assert done.code == 1
    assert "with other bits" in done.out


def test_a_fixed_bug_no_longer_reproduces(cli, made) -> None:
    finding = replace(made.case.finding, data={"loss": 9.0, "limit": 1e6})
    fixed = replace(made, case=replace(made.case, finding=finding))
    done = cli("replay", str(fixed.written("fixed")))
    assert done.code == 0
    assert "no longer reproduces" in done.out


def test_a_tar_is_replayed_and_json_tells_all(cli, made, tmp_path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as out:
        out.add(made.written(), arcname="capsule")
    record = cli("replay", "a.tar", "--json").record
    assert record["replay"]["verdict"] == "bits"
    assert record["replay"]["number"] == 1


def test_an_experiment_says_its_sentence(cli, made) -> None:
    done = cli("replay", str(made.written()), "--experiment", "supervised_tokens")
    assert done.code == 1
    assert len(done.out.splitlines()) == 4
    assert "fp32" in cli("replay", str(made.written()), "--precision", "fp32").out


def test_what_cannot_be_replayed_says_what_is_missing(cli, made) -> None:
    done = cli("replay", str(made.written("ids", rows="ids")))
    assert done.code == 2
    assert "SYS415" in done.err
    assert "rows" in done.err


def test_wrong_uses_are_refused_with_what_would_be_right(cli, made) -> None:
    path = str(made.written())
    unknown = cli("replay", path, "--experiment", "fp31")
    assert unknown.code == 2
    assert "SYS416" in unknown.err
    assert "fp32" in unknown.err
    assert "bf16" in cli("replay", path, "--precision", "int8").err
    absent = cli("replay", "nowhere\x1b[2J")
    assert absent.code == 2
    assert "SYS410" in absent.err
    assert "\x1b" not in absent.err


def test_a_damaged_capsule_is_refused_and_not_replayed(cli, made) -> None:
    path = made.written("damaged")
    whole = (path / "tensors.safetensors").read_bytes()
    (path / "tensors.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    done = cli("replay", str(path))
    assert done.code == 2
    assert "SYS411" in done.err
