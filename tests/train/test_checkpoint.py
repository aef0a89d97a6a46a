"""A checkpoint is whole or absent, and holds what it was given and nothing else."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finitune.core.errors import Halted
from finitune.core.files import read_manifest
from finitune.engine.snapshot import Buffers
from finitune.train import checkpoint
from finitune.train.checkpoint import MANIFEST_FILE, OPTIMIZER_FILE, STATE_FILE, TRUSTED_FILE, Content, StoredBase
from finitune.train.prepare import Prepared
from finitune.train.step import Parts
from support.checkpoints import SMALL, Story, bits, entries, flip, full_disk, inodes, train, write
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
    for name, tensor in prepared.port.state_tensors():
        if tensor.dim():
            # A second moment is never negative: the update would be NaN.
            third = 1e-40 if name.endswith("exp_avg_sq") else -1e-40
            tensor.detach().view(-1)[:3] = torch.tensor([-0.0, 1e-45, third])
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
    assert set(entries(tmp_path)) <= {*names, "journal.jsonl"}, "nothing is left aside"


def test_a_run_folder_that_has_vanished_is_not_made_anew(tmp_path: Path, prepared: Prepared) -> None:
    """Below the mount point of a disk that is gone, the checkpoint would fill another one."""
    with pytest.raises(FileNotFoundError, match="vanished"):
        write(prepared, tmp_path / "gone")
    assert not (tmp_path / "gone").exists()
