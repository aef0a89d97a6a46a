"""A checkpoint is whole or absent, holds what it was given and nothing else, and is trusted only where it is good."""

from __future__ import annotations

import errno
import json
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finitune.core.errors import Halted
from finitune.core.files import read_manifest, verify_manifest, write_manifest
from finitune.core.journal import Journal
from finitune.engine.snapshot import Buffers
from finitune.numerics.digest import digest
from finitune.train import checkpoint
from finitune.train.checkpoint import MANIFEST_FILE, OPTIMIZER_FILE, STATE_FILE, TRUSTED_FILE, Content, StoredBase
from finitune.train.prepare import Prepared
from support.runs import loop_of, ready

SMALL = "tiny-llama:hidden=16,layers=1,heads=2,kv_heads=1,mlp=32"


def content(prepared: Prepared, line: int = 0, **facts: Any) -> Content:
    """The live state of a run."""
    port = prepared.port
    return Content(dict(port.state_tensors()), port.state_record(), line, facts)


def write(prepared: Prepared, run_dir: Path, line: int = 0, **facts: Any) -> Path:
    return checkpoint.write(content(prepared, line, **facts), prepared.port.parts, prepared.tokenizer, run_dir)


def bits(prepared: Prepared) -> str:
    return digest(prepared.port.state_tensors(), prepared.port.state_record())


def train(prepared: Prepared, folder: Path, steps: int = 1) -> None:
    loop = loop_of(prepared, folder)
    for _ in range(steps):
        loop.one()


def entries(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def inodes(folder: Path) -> dict[str, tuple[int, int]]:
    """Which files stand there, and since when."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with checkpoints of steps 2, 4 and 6; copied by those who change it."""
    work = tmp_path_factory.mktemp("story")
    prepared = ready(work, model=SMALL)
    for _ in range(3):
        train(prepared, work, 2)
        write(prepared, work, note=[1, "x"])
    return work


@pytest.fixture
def run_dir(story: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(story, tmp_path / "copy"))


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    made = ready(tmp_path, model=SMALL)
    train(made, tmp_path, 2)
    return made


# ---------------------------------------------------------------- what is written


def test_a_checkpoint_holds_model_tokenizer_moments_state_and_manifest(story: Path) -> None:
    names = set(entries(story / "checkpoint-4"))
    assert {"model.safetensors", "config.json", "tokenizer.json", OPTIMIZER_FILE, STATE_FILE, MANIFEST_FILE} <= names
    assert TRUSTED_FILE not in names
    suffixes = {Path(n).suffix for n in names}
    assert suffixes <= {".safetensors", ".json", ".jinja", ".txt", ".model"}, "nothing that could hold a pickle"
    assert checkpoint.faults_of(story / "checkpoint-4") == []
    assert not [n for n in entries(story) if n.startswith(".")], "nothing is left aside"


def test_facts_and_counters_are_in_the_manifest(story: Path) -> None:
    folder = story / "checkpoint-4"
    manifest = read_manifest(folder)
    assert [manifest[k] for k in ("step", "updates", "attempt", "line")] == [4, 4, 4, 0]
    assert checkpoint.facts(folder) == {"note": [1, "x"]}
    assert checkpoint.step_of(folder) == 4


def test_what_was_written_is_what_is_loaded(tmp_path: Path, prepared: Prepared) -> None:
    folder, there = write(prepared, tmp_path), bits(prepared)
    train(prepared, tmp_path, 2)
    further = bits(prepared)
    StoredBase(folder, 2, 2, prepared.port.parts).restore(prepared.port)
    assert bits(prepared) == there
    train(prepared, tmp_path, 2)
    assert bits(prepared) == further


def test_the_state_before_the_first_step_can_be_written_and_loaded(tmp_path: Path) -> None:
    """No moments exist yet."""
    prepared = ready(tmp_path, model=SMALL)
    folder, there = write(prepared, tmp_path), bits(prepared)
    assert load_file(str(folder / OPTIMIZER_FILE)) == {}
    train(prepared, tmp_path, 2)
    StoredBase(folder, 0, 0, prepared.port.parts).restore(prepared.port)
    assert bits(prepared) == there


def test_minus_zero_and_subnormals_are_written_as_they_are(tmp_path: Path, prepared: Prepared) -> None:
    for _, tensor in prepared.port.state_tensors():
        if tensor.dim():
            tensor.detach().view(-1)[:3] = torch.tensor([-0.0, 1e-45, -1e-40])
    folder, there = write(prepared, tmp_path), bits(prepared)
    train(prepared, tmp_path, 1)
    StoredBase(folder, 2, 2, prepared.port.parts).restore(prepared.port)
    assert bits(prepared) == there


def test_numbers_of_the_record_that_are_not_finite_survive_in_strict_json(tmp_path: Path, prepared: Prepared) -> None:
    prepared.port.state.movement = (math.nan, -math.inf)
    folder, there = write(prepared, tmp_path), bits(prepared)

    def refuse(token: str) -> None:
        raise AssertionError(token)

    json.loads((folder / STATE_FILE).read_text(), parse_constant=refuse)
    prepared.port.state.movement = None
    checkpoint.load(prepared.port, folder)
    assert bits(prepared) == there


@pytest.mark.parametrize("kind", ["full", "tied", "lora"])
def test_it_loads_in_transformers_and_peft_with_the_bits_of_the_copy(tmp_path: Path, kind: str) -> None:
    """The files are made from copies while the live weights go on."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = f"{SMALL},tied=1" if kind == "tied" else SMALL
    prepared = ready(tmp_path, "data.eval_fraction=0", model=model)
    if kind == "lora":
        base = write(prepared, tmp_path)  # a whole model at step 0 is a base like any other
        lora = "lora={r: 2, modules_to_save: [lm_head]}"
        prepared = ready(tmp_path, "data.eval_fraction=0", lora, model=str(base))
    train(prepared, tmp_path, 2)
    tensors, record = Buffers().copy(prepared.port)
    expected = {n: p.detach().clone() for n, p in prepared.port.parts.model.state_dict().items()}
    train(prepared, tmp_path, 1)
    folder = checkpoint.write(Content(tensors, record), prepared.port.parts, prepared.tokenizer, tmp_path / "..")
    loaded = (AutoPeftModelForCausalLM if kind == "lora" else AutoModelForCausalLM).from_pretrained(folder)
    found = loaded.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    if kind == "tied":
        assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    shutil.rmtree(folder)


def test_writing_changes_nothing_in_the_run(tmp_path: Path, prepared: Prepared) -> None:
    there, mode = bits(prepared), prepared.port.parts.model.training
    grads = [p.requires_grad for p in prepared.port.parts.model.parameters()]
    write(prepared, tmp_path)
    assert bits(prepared) == there
    assert prepared.port.parts.model.training == mode
    assert [p.requires_grad for p in prepared.port.parts.model.parameters()] == grads


# ---------------------------------------------------------------- the same again


def test_the_same_state_is_not_written_again(tmp_path: Path, prepared: Prepared) -> None:
    folder = write(prepared, tmp_path)
    checkpoint.trust(folder, 50)
    before = inodes(folder)
    assert write(prepared, tmp_path) == folder
    assert inodes(folder) == before
    assert checkpoint.is_trusted(folder)


def test_another_state_of_the_same_step_replaces_it_and_its_trust(tmp_path: Path, prepared: Prepared) -> None:
    folder = write(prepared, tmp_path)
    checkpoint.trust(folder, 50)
    with torch.no_grad():
        prepared.port.parts.parameters[0][1].view(-1)[0] += 1.0
    there = bits(prepared)
    write(prepared, tmp_path)
    assert checkpoint.faults_of(folder) == []
    assert not checkpoint.is_trusted(folder)
    train(prepared, tmp_path, 1)
    StoredBase(folder, 2, 2, prepared.port.parts).restore(prepared.port)
    assert bits(prepared) == there


def test_the_same_state_on_another_line_is_written_again(tmp_path: Path, prepared: Prepared) -> None:
    folder = write(prepared, tmp_path, line=0)
    write(prepared, tmp_path, line=1)
    assert read_manifest(folder)["line"] == 1


def test_a_damaged_one_is_written_again(tmp_path: Path, prepared: Prepared) -> None:
    folder = write(prepared, tmp_path)
    flip(folder / "model.safetensors")
    write(prepared, tmp_path)
    assert checkpoint.faults_of(folder) == []


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weight", "moment"])
def test_a_state_that_is_not_finite_is_never_written(
    tmp_path: Path, prepared: Prepared, value: float, where: str
) -> None:
    folder = write(prepared, tmp_path)
    before = inodes(folder)
    tensors = dict(prepared.port.state_tensors())
    name = next(n for n in tensors if n.endswith("exp_avg") == (where == "moment"))
    tensors[name].detach().view(-1)[-1] = value
    prepared.port.state.step = 9
    with pytest.raises(Halted) as halted:
        write(prepared, tmp_path)
    assert halted.value.data["first"] == name
    assert halted.value.data["count"] == 1
    assert [n for n in entries(tmp_path) if "checkpoint" in n] == ["checkpoint-2"]
    assert inodes(folder) == before


@pytest.mark.parametrize("value", [1e20, 3e38, -3e38])
def test_a_number_that_is_large_is_finite(value: float) -> None:
    """Its square is beyond fp32; that is no reason to halt a run."""
    checkpoint.refuse_non_finite([("w", torch.tensor([1.0, value]))], "run", 1)


def full_disk(*_args: object, **_kw: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("at", ["save_file", "write_model", "write_manifest"])
def test_a_full_disk_leaves_what_stood_and_nothing_else(
    tmp_path: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    folder = write(prepared, tmp_path)
    before, names = inodes(folder), entries(tmp_path)
    train(prepared, tmp_path, 1)
    monkeypatch.setattr(checkpoint, at, full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(prepared, tmp_path)
    assert inodes(folder) == before
    assert set(entries(tmp_path)) <= {*names, "journal.jsonl"}


def test_a_run_folder_that_has_vanished_is_not_made_anew(tmp_path: Path, prepared: Prepared) -> None:
    """Below the mount point of a disk that is gone, the checkpoint would fill another one."""
    with pytest.raises(FileNotFoundError, match="vanished"):
        write(prepared, tmp_path / "gone")
    assert not (tmp_path / "gone").exists()


# ---------------------------------------------------------------- damage


def flip(path: Path, at: int = -5) -> None:
    spoilt = bytearray(path.read_bytes())
    spoilt[at] ^= 1
    path.write_bytes(bytes(spoilt))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


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
def test_damage_is_found_and_named_and_the_one_before_is_taken(run_dir: Path, damage: str) -> None:
    spoil, named = DAMAGES[damage]
    folder = run_dir / "checkpoint-6"
    spoil(folder)
    faults = checkpoint.faults_of(folder)
    assert any(named in fault for fault in faults), faults
    found, findings = checkpoint.newest_good(run_dir)
    assert found == run_dir / "checkpoint-4"
    assert [(f.code, f.where) for f in findings] == [("SYS006", str(folder))]
    assert named in findings[0].data["faults"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_no_base_for_a_redo(run_dir: Path, prepared: Prepared, damage: str) -> None:
    DAMAGES[damage][0](run_dir / "checkpoint-6")
    bases = checkpoint.bases(run_dir, [], prepared.port.parts)
    assert [b.step for b in bases if b.intact()] == [4, 2]


def test_a_damaged_checkpoint_is_among_the_bases_so_that_it_can_be_named(run_dir: Path, prepared: Prepared) -> None:
    truncate(run_dir / "checkpoint-6" / MANIFEST_FILE)
    flip(run_dir / "checkpoint-4" / "model.safetensors")
    assert 4 in [b.step for b in checkpoint.bases(run_dir, [], prepared.port.parts)]


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


def test_bases_are_those_on_the_line_newest_first_with_their_counters(run_dir: Path, prepared: Prepared) -> None:
    parts = prepared.port.parts
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
