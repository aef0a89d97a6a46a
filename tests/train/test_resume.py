"""Going on with a run: from where, and with what changed. Bit-exact resumes are in test_run.py."""

from __future__ import annotations

import os
import shutil

import pytest

from finitune.core.errors import UserError
from finitune.core.messages.catalogue import set_language
from finitune.train import facts
from finitune.train.folder import find_place
from finitune.train.past import stored_recipe
from finitune.train.recipe_io import load_recipe
from finitune.train.run import open_run, train_run
from support.killed import Killed, edit_state, flip, kill, killed_run, losses, records, refused, resume, said, weights
from support.runs import tiny_recipe, write_rows

pytestmark = pytest.mark.usefixtures("quick_plan", "open_sessions")


# --- Where it goes on -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_killed_run_goes_on_from_its_newest_checkpoint_to_the_same_bits(tmp_path, kind, request):
    source: Killed = request.getfixturevalue(kind)
    run = source.again(tmp_path)
    result = resume(run)
    assert (result.status, result.steps) == ("finished", 8)
    assert (weights(run), losses(run)) == (weights(source.whole), losses(source.whole))
    told = said(run, "SYS026")
    assert (told["step"], told["total"], told["point"], told["again"]) == (4, 8, "checkpoint-4", 1)
    record = records(run, "resume")[-1]
    assert (record["step"], record["checkpoint"]) == (4, "checkpoint-4")
    assert record["facts"]["recipe"] == records(run, "start")[-1]["facts"]["recipe"]
    assert "changes" not in record["facts"]
    assert not set(result.findings) & {"SYS022", "SYS023", "SYS024", "SYS025", "SYS028", "SYS029"}


def test_a_run_killed_before_its_first_checkpoint_begins_again_in_its_folder(tmp_path):
    source = killed_run(tmp_path / "of", "save_steps=8", step=3)
    run = source.again(tmp_path)
    assert resume(run).status == "finished"
    assert weights(run) == weights(source.whole)
    told = said(run, "SYS026")
    assert (told["step"], told["again"], told["point"]) == (0, 3, "the start")
    assert records(run, "resume")[-1]["checkpoint"] is None


def test_a_run_killed_before_its_first_line_may_begin_with_any_settings(tmp_path, full):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(full.killed / "recipe.yaml", run)
    assert resume(run, "learning_rate=5e-4", "max_steps=2", "optim=sgd").status == "finished"
    assert load_recipe(str(run / "recipe.yaml")).optim == "sgd"


def test_a_run_that_has_trained_but_saved_nothing_needs_permission_for_changes(tmp_path):
    source = killed_run(tmp_path / "of", "save_steps=8", step=3)
    run = source.again(tmp_path)
    # Nothing has to fit yet, so nothing is impossible.
    assert "SYS020" in (message := refused(run, "optim=sgd", "learning_rate=5e-4"))
    assert 'optim: was "adamw_torch_fused", now "sgd"' in message
    assert resume(run, "optim=sgd", "learning_rate=5e-4", allow=True).status == "finished"


def test_a_damaged_checkpoint_is_passed_over_named_and_put_aside(tmp_path, full):
    run = full.again(tmp_path)
    flip(run / "checkpoint-4" / "model.safetensors")
    (run / "checkpoint-4" / "state.json").unlink()
    result = resume(run, "save_total_limit=1")
    assert (result.status, weights(run)) == ("finished", weights(full.whole))
    faults = said(run, "SYS006")["faults"]
    assert "model.safetensors" in faults
    assert "state.json" in faults
    told = said(run, "SYS026")
    assert (told["point"], told["again"]) == ("checkpoint-2", 3)
    assert (run / "damaged-checkpoint-4" / "model.safetensors").is_file()
    assert "checkpoint-8" in os.listdir(run)


def test_without_any_good_checkpoint_every_fault_is_told(tmp_path, full):
    run = full.again(tmp_path)
    for number in (2, 4):
        flip(run / f"checkpoint-{number}" / "optimizer.safetensors")
    message = refused(run)
    assert message.startswith("SYS005")
    assert "checkpoint-2: " in message
    assert "checkpoint-4: " in message


def test_saved_checkpoints_that_are_gone_are_missed(tmp_path, full):
    run = full.again(tmp_path)
    for number in (2, 4):
        shutil.rmtree(run / f"checkpoint-{number}")
    message = refused(run)
    assert "checkpoint-2, checkpoint-4 were saved and are not there any more" in message


def test_a_checkpoint_that_is_named_is_the_one_even_where_newer_ones_stand(tmp_path, full):
    run = full.finished(tmp_path)
    assert resume(run / "checkpoint-6", "save_steps=7").status == "finished"
    assert (weights(run), losses(run)) == (weights(full.whole), losses(full.whole))
    told = said(run, "SYS028")
    assert (told["step"], told["last"], told["newer"]) == (6, 8, "checkpoint-8")
    assert [(r["from_step"], r["to_step"]) for r in records(run, "rollback")] == [(8, 6)]


def test_what_a_run_went_back_from_is_no_longer_resumed_from(tmp_path, full):
    """Killed right after going back: the newer checkpoint is of a line that was left."""
    run = full.again(tmp_path)
    kill(open_run(None, resume=str(run / "checkpoint-2")))
    assert sorted(p.name for p in run.glob("*checkpoint*")) == ["abandoned-1-checkpoint-4", "checkpoint-2"]
    os.rename(run / "abandoned-1-checkpoint-4", run / "checkpoint-4")  # killed before the renaming
    again = open_run(None, resume=str(run))
    assert again.prepared.port.state.step == 2
    kill(again)
    assert "abandoned-1-checkpoint-4" in os.listdir(run)
    os.rename(run / "abandoned-1-checkpoint-4", run / "checkpoint-4")
    with pytest.raises(UserError, match="line that the run left when it went back to step 2"):
        open_run(None, resume=str(run / "checkpoint-4"))


def test_a_named_checkpoint_that_is_damaged_is_an_error_with_its_faults(tmp_path, full):
    run = full.again(tmp_path)
    flip(run / "checkpoint-4" / "model.safetensors")
    message = refused(run, name=run / "checkpoint-4")
    assert message.startswith("SYS005")
    assert "model.safetensors" in message


def test_a_named_checkpoint_brings_its_own_settings(tmp_path, full):
    run = full.again(tmp_path)
    resume(run, "learning_rate=5e-4", "max_steps=6", allow=True)
    recipe = stored_recipe(find_place(str(run / "checkpoint-4")))
    assert (recipe.learning_rate, recipe.max_steps) == (1e-3, 8)
    assert stored_recipe(find_place(str(run))).learning_rate == 5e-4
    resume(run / "checkpoint-4")
    assert weights(run) == weights(full.whole)


# --- What changed -----------------------------------------------------------------------------------------------------


def test_harmless_changes_go_on_to_the_same_bits_with_a_note(tmp_path, full):
    run = full.again(tmp_path)
    moved = shutil.copy(full.rows, tmp_path / "moved.jsonl")
    overrides = ("logging_steps=5", "save_steps=3", f"data.train={moved}", "data.format=messages", "report_to=csv")
    result = resume(run, *overrides)
    assert (result.status, weights(run)) == ("finished", weights(full.whole))
    changes = said(run, "SYS029")["changes"]
    assert len(changes) == len(overrides)
    assert any(c.startswith("logging_steps: was 1, now 5 (") for c in changes)
    assert any("rows.jsonl" in c and "moved.jsonl" in c for c in changes)
    assert load_recipe(str(run / "recipe.yaml")).save_steps == 3


def test_other_held_out_rows_do_not_touch_the_training_but_are_told(tmp_path, full):
    run = full.again(tmp_path)
    shutil.rmtree(run / "checkpoint-4")
    held_out = write_rows(tmp_path / "other.jsonl", 5)
    message = refused(run, f"data.eval={held_out}")  # they were part of the training rows' file before
    assert "content of the training rows" in message
    source = killed_run(tmp_path / "of", f"data.eval={held_out}")
    run = source.again(tmp_path / "b")
    resume(run, f"data.eval={write_rows(tmp_path / 'third.jsonl', 7)}")
    assert weights(run) == weights(source.whole)
    assert [c.partition(":")[0] for c in said(run, "SYS029")["changes"]] == [
        "data.eval",
        "content of the held-out rows",
    ]


def test_a_longer_run_goes_on_and_says_how_the_rate_jumps(tmp_path, full):
    run = full.finished(tmp_path)
    result = resume(run, "max_steps=12")
    assert (result.status, result.steps) == ("finished", 12)
    assert (said(run, "SYS024")["was"], said(run, "SYS024")["now"]) == (8, 12)
    jump = said(run, "SYS025")
    first = next(r for r in records(run, "step") if r["step"] == 9)
    assert jump["was_rate"] == 0.0
    assert jump["now_rate"] == first["lr"] > 0
    assert resume(run).findings == {"SYS027": 1}, "the longer length is the run's length from now on"


def test_a_longer_run_at_a_constant_rate_has_no_jump(tmp_path):
    source = killed_run(tmp_path / "of", "lr_scheduler_type=constant_with_warmup", "warmup_steps=1")
    result = resume(source.finished(tmp_path), "max_steps=9")
    assert result.findings["SYS024"] == 1
    assert "SYS025" not in result.findings


@pytest.mark.parametrize(("length", "steps"), [(6, 6), (3, 4)])
def test_a_shorter_run_ends_where_it_says_or_where_it_stands(tmp_path, full, length, steps):
    run = full.again(tmp_path)
    result = resume(run, f"max_steps={length}")
    assert (result.status, result.steps, said(run, "SYS024")["left"]) == ("finished", steps, max(0, length - 4))


def test_a_length_in_epochs_is_a_length(tmp_path, full):
    run = full.again(tmp_path)
    assert resume(run, "num_train_epochs=0.2").steps == 6


def test_other_versions_and_threads_are_explained(tmp_path, full, monkeypatch):
    run = full.again(tmp_path)
    real = facts.machine

    def another(device):
        found = real(device)
        return found | {"threads": 77, "versions": found["versions"] | {"torch": "1.0"}}

    monkeypatch.setattr(facts, "machine", another)
    assert resume(run).status == "finished"
    changes = said(run, "SYS023")["changes"]
    assert [c.split(":")[0] for c in changes] == ["number of threads", "versions.torch"]
    assert ", now 77 (" in changes[0]
    assert ', now "1.0" (' in changes[1]


def test_kernels_that_only_round_otherwise_are_explained(tmp_path, full):
    run = full.again(tmp_path)
    assert resume(run, "optim=adamw_torch", "loss.chunk_tokens=7", "gradient_checkpointing=true").status == "finished"
    assert len(said(run, "SYS023")["changes"]) == 3


NEED_PERMISSION = {
    "learning_rate": ("1e-3", "5e-4"),
    "per_device_train_batch_size": ("2", "4"),
    "gradient_accumulation_steps": ("1", "2"),
    "weight_decay": ("0.0", "0.1"),
    "adam_beta2": ("0.999", "0.95"),
    "lr_scheduler_type": ('"cosine"', "linear"),
    "warmup_steps": ("null", "3"),
    "max_grad_norm": ("1.0", "0.5"),
    "data.packing": ("false", "true"),
    "seed": ("42", "7"),
    "guard.max_aborts_in_a_row": ("8", "3"),
    "guard.state_check_steps": ("50", "5"),
    "model.attn_implementation": ('"sdpa"', "eager"),
    "precision": ('"fp32"', "bf16-emulated"),
}


def test_changes_that_make_another_run_are_refused_all_at_once(tmp_path, full):
    run = full.again(tmp_path)
    message = refused(run, *(f"{key}={now}" for key, (_, now) in NEED_PERMISSION.items()), "data.limit_rows=30")
    assert message.startswith("SYS020")
    for key, (was, now) in NEED_PERMISSION.items():
        shown = was.replace("1e-3", "0.001")
        assert f"\n    {key}: was {shown}, now " in message, key
        assert now.replace("5e-4", "0.0005") in message
    assert "\n    data.limit_rows: was 400, now 30 (" in message
    assert "content of the training rows: was " in message
    assert "--allow-changes" in message
    assert f"(differences: {len(NEED_PERMISSION) + 2})" in message


def test_the_refusal_speaks_chinese(tmp_path, full):
    run = full.again(tmp_path)
    set_language("zh")
    try:
        assert "learning_rate：原为 0.001，现为 0.0005" in refused(run, "learning_rate=5e-4")
    finally:
        set_language(None)


def test_rows_that_changed_under_the_same_name_are_seen(tmp_path):
    source = killed_run(tmp_path / "of")
    run = source.again(tmp_path)
    lines = source.rows.read_text().splitlines()
    source.rows.write_text("\n".join([*lines[:-1], lines[-1].replace("the", "a")]) + "\n")
    assert "content of the training rows" in refused(run)


def test_another_kind_of_device_needs_permission_another_of_its_kind_does_not(tmp_path, full, monkeypatch):
    run = full.again(tmp_path)
    real = facts.machine
    monkeypatch.setattr(facts, "machine", lambda device: real(device) | {"device": {"type": "tpu", "name": "x"}})
    assert 'kind of device: was "cpu", now "tpu"' in refused(run)
    monkeypatch.setattr(facts, "machine", lambda device: real(device) | {"device": {"type": "cpu", "name": "x"}})
    assert resume(run).findings["SYS023"] == 1


def test_with_permission_it_goes_on_and_says_what_is_not_exact(tmp_path, full):
    run = full.again(tmp_path)
    result = resume(run, "per_device_train_batch_size=4", "learning_rate=5e-4", "precision=fp16-emulated", allow=True)
    assert (result.status, result.steps) == ("finished", 8)
    told = said(run, "SYS022")
    assert len(told["changes"]) == 3
    # 29 steps of 2 rows, of which 4 are done, became 15 steps of 4.
    assert (told["epoch"], told["batch"], told["batches"]) == (0, 4 * 15 // 29 + 1, 15)
    changes = records(run, "resume")[-1]["facts"]["changes"]
    assert {"what": "learning_rate", "was": 1e-3, "now": 5e-4, "kind": "needs_permission"} in changes
    assert weights(run) != weights(full.whole)


def test_fewer_rows_with_permission_stay_inside_the_data(tmp_path, full):
    run = full.again(tmp_path)
    edit_state(run / "checkpoint-4", cursor={"epoch": 0, "step": 28})
    assert resume(run, "data.limit_rows=4", allow=True).status == "finished"


def test_what_was_allowed_once_is_not_asked_again(tmp_path, full):
    run = full.again(tmp_path)
    recipe = stored_recipe(find_place(str(run)), ["learning_rate=5e-4"])
    kill(open_run(recipe, resume=str(run), allow_changes=True))
    for _ in range(2):
        again = open_run(None, resume=str(run))
        assert again.prepared.port.parts.optim_settings.lr == 5e-4
        kill(again)
    assert "weight_decay: was 0.0, now 0.5" in (message := refused(run, "weight_decay=0.5"))
    assert "learning_rate" not in message
    assert resume(run).status == "finished"
    assert "allowed when the run was resumed before" in said(run, "SYS029")["changes"][0]


IMPOSSIBLE = [
    ("lora", "lora.r=4", "lora.r: was 2, now 4"),
    ("lora", "lora.target_modules=[q_proj]", 'lora.target_modules: was "auto", now ['),
    ("lora", "lora.use_dora=true", "lora.use_dora: was false, now true"),
    ("lora", "lora=null", "lora: was {"),
    ("lora", "optim=sgd", 'optim: was "adamw_torch_fused", now "sgd"'),
    ("full", "lora={r: 4}", "lora: was null, now {"),
    ("full", "freeze=['*embed_tokens*']", "freeze: was [], now ["),
    ("full", "model.name_or_path=tiny-internlm2", 'model.name_or_path: was "tiny-llama", now "tiny-internlm2"'),
]


@pytest.mark.parametrize(("kind", "override", "words"), IMPOSSIBLE)
def test_what_does_not_fit_the_checkpoint_is_refused_always(tmp_path, kind, override, words, request):
    run = request.getfixturevalue(kind).again(tmp_path)
    message = refused(run, override, "learning_rate=5e-4", allow=True)
    assert message.startswith("SYS021")
    assert words in message
    assert "SYS020" not in message
    if override in ("lora.r=4", "lora={r: 4}"):
        message = refused(run, override, "learning_rate=5e-4")
        assert ("SYS021" in message, "SYS020" in message) == (True, True)
        assert "is compared once this fits" in message


def test_a_base_model_that_was_trained_on_meanwhile_is_another_model(tmp_path):
    base = killed_run(tmp_path / "base_of", "max_steps=4", step=1).whole
    model, moved = tmp_path / "model", tmp_path / "moved"
    shutil.copytree(base / "final", model)
    source = killed_run(tmp_path / "of", "lora={r: 2}", model=str(model))
    run = source.again(tmp_path)
    shutil.copytree(model, moved)
    assert resume(run, f"model.name_or_path={moved}").status == "finished"
    assert weights(run) == weights(source.whole)
    shutil.copy(base / "checkpoint-2" / "model.safetensors", model)
    message = refused(source.again(tmp_path / "b"), allow=True)
    assert message.startswith("SYS021")
    assert "weights of the base model" in message


def test_a_recipe_beside_resume_is_compared_like_overrides(tmp_path, full):
    run = full.again(tmp_path)
    fixed = ("max_steps=8", "save_steps=2", "save_in_background=false", "snapshots.memory_share=0")
    same = tiny_recipe(full.rows.parent, *fixed, "precision=auto", "device=auto", "output_dir=auto")
    same = same.model_copy(update={"precision": "fp32"})
    with pytest.raises(UserError, match=r"(?s)SYS020.*seed: was 42, now 9"):
        train_run(same.model_copy(update={"seed": 9}), resume=str(run))
    assert train_run(same, resume=str(run)).status == "finished"
    assert weights(run) == weights(full.whole)
