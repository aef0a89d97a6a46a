"""A damaged checkpoint is found and named, and only a good one is trusted."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finitune.core.files import read_manifest, verify_manifest, write_manifest
from finitune.core.journal import Journal
from finitune.train import checkpoint
from finitune.train.checkpoint import MANIFEST_FILE, OPTIMIZER_FILE, STATE_FILE, TRUSTED_FILE, StoredBase
from finitune.train.prepare import Prepared
from finitune.train.step import Parts
from support.checkpoints import SMALL, Story, bits, flip, full_disk, inodes, truncate
from support.runs import ready


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Story:
    return Story.tell(tmp_path_factory.mktemp("story"))


@pytest.fixture
def story(told: Story) -> Path:
    return told.folder


@pytest.fixture
def parts(told: Story) -> Parts:
    return told.prepared.port.parts


@pytest.fixture
def run_dir(story: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(story, tmp_path / "copy"))


@pytest.fixture
def prepared(told: Story) -> Prepared:
    """At step 2."""
    told.second.restore(told.prepared.port)
    return told.prepared


# ---------------------------------------------------------------- damage


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit in the weights": (lambda f: flip(f / "model.safetensors"), "model.safetensors"),
    "a flipped bit in the moments": (lambda f: flip(f / OPTIMIZER_FILE), OPTIMIZER_FILE),
    "a flipped bit in the state": (lambda f: flip(f / STATE_FILE, 40), STATE_FILE),
    "a flipped bit in the manifest": (lambda f: flip(f / MANIFEST_FILE, 40), MANIFEST_FILE),
    "torn weights": (lambda f: truncate(f / "model.safetensors"), "model.safetensors"),
    "torn moments": (lambda f: truncate(f / OPTIMIZER_FILE), OPTIMIZER_FILE),
    "a torn state": (lambda f: truncate(f / STATE_FILE), STATE_FILE),
    "a torn manifest": (lambda f: truncate(f / MANIFEST_FILE), MANIFEST_FILE),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "no moments": (lambda f: (f / OPTIMIZER_FILE).unlink(), OPTIMIZER_FILE),
    "no manifest": (lambda f: (f / MANIFEST_FILE).unlink(), MANIFEST_FILE),
    "moments of another step": (
        lambda f: shutil.copy(f.parent / "checkpoint-2" / OPTIMIZER_FILE, f / OPTIMIZER_FILE),
        OPTIMIZER_FILE,
    ),
    "state of another step": (
        lambda f: shutil.copy(f.parent / "checkpoint-2" / STATE_FILE, f / STATE_FILE),
        STATE_FILE,
    ),
    "a pickle": (lambda f: (f / "optimizer.pt").write_bytes(pickle.dumps({"a": 1})), "optimizer.pt"),
    "a pickle under a harmless name": (lambda f: (f / "notes.txt").write_bytes(pickle.dumps({"a": 1})), "notes.txt"),
    "code": (lambda f: (f / "modeling_x.py").write_text("import os\n"), "modeling_x.py"),
    "a stranger": (lambda f: (f / "extra.json").write_text("{}"), "extra.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named_and_the_one_before_is_taken(run_dir: Path, parts: Parts, damage: str) -> None:
    spoil, named = DAMAGES[damage]
    folder = run_dir / "checkpoint-6"
    spoil(folder)
    faults = checkpoint.faults_of(folder)
    assert any(named in fault for fault in faults), faults
    found, findings = checkpoint.newest_good(run_dir)
    assert found == run_dir / "checkpoint-4"
    assert [(f.code, f.where) for f in findings] == [("SYS006", str(folder))]
    assert named in findings[0].data["faults"]
    bases = checkpoint.bases(run_dir, [], parts)
    assert [b.step for b in bases if b.intact()] == [4, 2], "no base for a redo either"


def test_a_damaged_checkpoint_is_among_the_bases_so_that_it_can_be_named(run_dir: Path, parts: Parts) -> None:
    truncate(run_dir / "checkpoint-6" / MANIFEST_FILE)
    flip(run_dir / "checkpoint-4" / "model.safetensors")
    assert 4 in [b.step for b in checkpoint.bases(run_dir, [], parts)]


def test_all_damaged_leaves_none_and_names_each(run_dir: Path) -> None:
    for step in (2, 4, 6):
        flip(run_dir / f"checkpoint-{step}" / "model.safetensors")
    found, findings = checkpoint.newest_good(run_dir)
    assert found is None
    assert [Path(f.where).name for f in findings] == ["checkpoint-6", "checkpoint-4", "checkpoint-2"]


def test_a_folder_renamed_to_another_step_is_named(run_dir: Path) -> None:
    (run_dir / "checkpoint-6").rename(run_dir / "checkpoint-9")
    (fault,) = checkpoint.faults_of(run_dir / "checkpoint-9")
    assert "written at step 6" in fault
    assert "checkpoint-9" in fault
    assert checkpoint.newest_good(run_dir)[0] == run_dir / "checkpoint-4"


def test_a_manifest_that_lists_no_state_is_named(run_dir: Path) -> None:
    folder = run_dir / "checkpoint-6"
    facts = {k: v for k, v in read_manifest(folder).items() if k not in ("files", "schema", "self")}
    (folder / STATE_FILE).unlink()
    (folder / MANIFEST_FILE).unlink()
    write_manifest(folder, facts)
    assert verify_manifest(folder) == []
    assert any(STATE_FILE in fault for fault in checkpoint.faults_of(folder))


def rewritten(folder: Path, **changes: Any) -> None:
    """The state with other values and a manifest that agrees with it: as another version would write it."""
    facts = {k: v for k, v in read_manifest(folder).items() if k not in ("files", "schema", "self")}
    record = json.loads((folder / STATE_FILE).read_text()) | changes
    (folder / STATE_FILE).write_text(json.dumps(record))
    (folder / MANIFEST_FILE).unlink()
    write_manifest(folder, facts)


@pytest.mark.parametrize("schema", [1, 99, None])
def test_a_state_of_another_schema_is_refused_with_its_number(run_dir: Path, prepared: Prepared, schema: Any) -> None:
    folder = run_dir / "checkpoint-6"
    rewritten(folder, schema=schema)
    with pytest.raises(ValueError, match=f"schema {schema}"):
        checkpoint.load(prepared.port, folder)
    with pytest.raises(ValueError, match=f"schema {schema}"):
        StoredBase(folder, 6, 6, prepared.port.parts).restore(prepared.port)


def test_moments_of_another_model_are_refused_with_nothing_changed(
    story: Path, tmp_path: Path, prepared: Prepared
) -> None:
    other = ready(tmp_path, "freeze=['*embed_tokens*']", model=SMALL)
    before = bits(other)
    with pytest.raises((KeyError, ValueError)):
        checkpoint.load(other.port, story / "checkpoint-4")
    assert bits(other) == before


# ---------------------------------------------------------------- which there are


def test_checkpoints_are_listed_newest_first_by_number(run_dir: Path) -> None:
    (run_dir / "checkpoint-4").rename(run_dir / "checkpoint-100")
    for name in ("checkpoint-", "checkpoint-x", "checkpoint-7b", "abandoned-1-checkpoint-8", ".checkpoint-9.1-a.tmp"):
        (run_dir / name).mkdir()
    (run_dir / "checkpoint-11").write_text("a file")
    assert [p.name for p in checkpoint.listed(run_dir)] == ["checkpoint-100", "checkpoint-6", "checkpoint-2"]


@pytest.mark.parametrize("name", ["checkpoint-²", "checkpoint-①"])
def test_a_digit_that_is_no_number_is_no_checkpoint(run_dir: Path, name: str) -> None:
    """str.isdigit takes more than int does."""
    (run_dir / name).mkdir()
    assert [p.name for p in checkpoint.listed(run_dir)] == ["checkpoint-6", "checkpoint-4", "checkpoint-2"]


def test_an_empty_or_absent_run_has_none(tmp_path: Path) -> None:
    assert checkpoint.listed(tmp_path) == []
    assert checkpoint.newest_good(tmp_path) == (None, [])


LINES = [
    (2, 0, [], True),
    (4, 0, [2], False),
    (2, 0, [2], True),
    (4, 1, [2], True),
    (4, 1, [2, 3], False),
    (4, 2, [2, 3], True),
    (2, 0, [4, 2], True),
    (3, 0, [4, 2], False),
    (3, 1, [4, 3], True),
]


@pytest.mark.parametrize(("step", "line", "rollbacks", "expected"), LINES)
def test_a_checkpoint_is_on_the_line_unless_the_run_went_back_before_it(
    tmp_path: Path, step: int, line: int, rollbacks: list[int], expected: bool
) -> None:
    write_manifest(tmp_path, {"step": step, "line": line})
    assert checkpoint.on_the_line(tmp_path, rollbacks) is expected


def test_the_newest_good_one_is_on_the_line(run_dir: Path) -> None:
    journal = Journal(run_dir / "journal.jsonl")
    journal.write("rollback", from_step=7, to_step=4, attempt=4, reason="a test", base=4)
    journal.close()
    found, findings = checkpoint.newest_good(run_dir)
    assert found == run_dir / "checkpoint-4"
    assert findings == [], "one of a line that was left is no fault"


def test_bases_are_those_on_the_line_newest_first_with_their_counters(run_dir: Path, parts: Parts) -> None:
    assert [(b.step, b.attempt) for b in checkpoint.bases(run_dir, [], parts)] == [(6, 6), (4, 4), (2, 2)]
    assert [b.step for b in checkpoint.bases(run_dir, [5], parts)] == [4, 2]


# ---------------------------------------------------------------- trust


def test_trust_is_a_mark_beside_the_manifest(run_dir: Path) -> None:
    folder = run_dir / "checkpoint-4"
    before = inodes(folder)
    assert not checkpoint.is_trusted(folder)
    checkpoint.trust(folder, 44)
    assert checkpoint.is_trusted(folder)
    assert checkpoint.faults_of(folder) == []
    assert json.loads((folder / TRUSTED_FILE).read_text())["trusted_at_step"] == 44
    after = inodes(folder)
    assert {n: after[n] for n in before} == before
    assert not checkpoint.is_trusted(run_dir / "checkpoint-6")


def test_the_mark_of_another_checkpoint_counts_for_nothing(run_dir: Path) -> None:
    checkpoint.trust(run_dir / "checkpoint-4", 44)
    shutil.copy(run_dir / "checkpoint-4" / TRUSTED_FILE, run_dir / "checkpoint-6" / TRUSTED_FILE)
    assert not checkpoint.is_trusted(run_dir / "checkpoint-6")


@pytest.mark.parametrize(
    "mark", [b"", b"{", b"[]", b"5", b"null", b"{}", b'{"manifest_sha256": 5}', b"\xff\xfe", b'"x"']
)
def test_a_mark_that_is_none_is_no_trust_and_raises_nothing(run_dir: Path, mark: bytes) -> None:
    folder = run_dir / "checkpoint-6"
    (folder / TRUSTED_FILE).write_bytes(mark)
    assert not checkpoint.is_trusted(folder)


def test_without_a_manifest_there_is_no_trust(run_dir: Path) -> None:
    folder = run_dir / "checkpoint-6"
    checkpoint.trust(folder, 50)
    (folder / MANIFEST_FILE).unlink()
    assert not checkpoint.is_trusted(folder)


def test_a_refusing_disk_is_an_error_of_the_promised_kind_and_no_trust(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "write_atomic", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.trust(run_dir / "checkpoint-6", 50)
    assert not checkpoint.is_trusted(run_dir / "checkpoint-6")


def test_loading_never_unpickles(run_dir: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_args: object, **_kw: object) -> None:
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, never)
    checkpoint.load(prepared.port, run_dir / "checkpoint-6")
    StoredBase(run_dir / "checkpoint-4", 4, 4, prepared.port.parts).restore(prepared.port)
    assert prepared.port.state.step == 4
