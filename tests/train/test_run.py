"""A whole run: what it leaves, how it stops, how it goes on, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finitune.core.errors import UserError
from finitune.core.files import verify_manifest
from finitune.core.journal import read
from finitune.numerics.digest import digest
from finitune.train import checkpoint, folder
from finitune.train.recipe_io import load_recipe
from finitune.train.run import open_run, train_run
from support.faults import at_step, poison_output
from support.runs import tiny_recipe


class Seen:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, object]] = []

    def __getattr__(self, name: str):
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda *args: self.events.append((name[3:], args[0] if args else None))

    def count(self, name: str) -> int:
        return sum(kind == name for kind, _ in self.events)


def kinds(run_dir: Path) -> list[str]:
    return [r["kind"] for r in read(run_dir / "journal.jsonl")]


def state_of(session) -> str:
    """Weights, moments and the whole record of a session's state."""
    return digest(session.prepared.port.state_tensors(), session.prepared.port.state_record())


def test_a_run_leaves_recipe_journal_checkpoint_result_and_summary(tmp_path: Path) -> None:
    seen = Seen()
    recipe = tiny_recipe(
        tmp_path, "max_steps=6", "save_steps=3", "eval_steps=3", "sample.prompts=[hello]", "sample.max_new_tokens=4"
    )
    result = train_run(recipe, observers=[seen])
    run = tmp_path / "run"
    assert (result.status, result.exit_code, result.steps, result.updates) == ("finished", 0, 6, 6)
    assert result.eval_after < result.eval_before
    assert kinds(run).count("step") == 6
    assert kinds(run)[0] == "start"
    assert kinds(run)[-1] == "end"
    assert [seen.count(k) for k in ("plan", "step", "eval", "sample", "save", "end")] == [1, 6, 3, 2, 2, 1]
    assert sorted(p.name for p in run.iterdir()) == [
        "checkpoint-3", "checkpoint-6", "final", "journal.jsonl", "recipe.yaml", "summary.json",
    ]  # fmt: skip
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"
    assert verify_manifest(run / "checkpoint-6") == []


def test_the_stored_recipe_runs_the_same_again(tmp_path: Path) -> None:
    first = train_run(tiny_recipe(tmp_path, "max_steps=4"))
    stored = load_recipe(str(tmp_path / "run" / "recipe.yaml"), [f"output_dir={tmp_path / 'again'}"])
    second = train_run(stored)
    assert first.train_loss == second.train_loss
    a, b = (load_file(str(Path(r.final_dir) / "model.safetensors")) for r in (first, second))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_result_loads_in_transformers_and_peft(tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    full = train_run(tiny_recipe(tmp_path, "max_steps=2"))
    model = AutoModelForCausalLM.from_pretrained(full.final_dir)
    assert AutoTokenizer.from_pretrained(full.final_dir).chat_template
    base = tmp_path / "base"
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(full.final_dir).save_pretrained(base)
    overrides = ("max_steps=2", "lora={r: 4}", f"output_dir={tmp_path / 'lora'}")
    adapter = train_run(tiny_recipe(tmp_path, *overrides, model=str(base)))
    assert (Path(adapter.final_dir) / "adapter_model.safetensors").is_file()
    assert AutoPeftModelForCausalLM.from_pretrained(adapter.final_dir)


KINDS = {
    "full fp32": (),
    "full fp16": ("precision=fp16-emulated",),
    "lora with dropout": ("lora={r: 4, lora_dropout: 0.1}",),
    "packed, accumulated": ("data.packing=true", "group_by_length=false", "gradient_accumulation_steps=2"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, kind: str) -> None:
    """Ctrl-C in step 5 of 12; the resumed run ends with the bits of the uninterrupted one."""
    overrides = ("max_steps=12", *KINDS[kind])
    whole = open_run(tiny_recipe(tmp_path, *overrides, f"output_dir={tmp_path / 'whole'}"))
    assert whole.run().status == "finished"

    class Interrupt:
        def on_step(self, event) -> None:
            if event.reading.step == 5:
                os.kill(os.getpid(), signal.SIGINT)

    stopped = train_run(tiny_recipe(tmp_path, *overrides), observers=[Interrupt()])
    assert (stopped.status, stopped.exit_code, stopped.steps, stopped.final_dir) == ("interrupted", 0, 5, None)
    resumed = open_run(None, resume=str(tmp_path / "run"))
    assert resumed.prepared.port.state.step == 5
    assert resumed.run().status == "finished"
    assert state_of(resumed) == state_of(whole)
    losses = [
        [r["loss"] for r in read(tmp_path / name / "journal.jsonl") if r["kind"] == "step"] for name in ("whole", "run")
    ]
    assert losses[0] == losses[1]


def test_resume_passes_over_a_damaged_checkpoint_and_says_so(tmp_path: Path) -> None:
    train_run(tiny_recipe(tmp_path, "max_steps=6", "save_steps=3"))
    shutil.rmtree(tmp_path / "run" / "final")
    weights = tmp_path / "run" / "checkpoint-6" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    session = open_run(None, resume=str(tmp_path / "run"))
    assert session.prepared.port.state.step == 3
    result = session.run()
    assert result.findings["SYS006"] == 1
    assert (result.status, result.steps) == ("finished", 6)


def test_resume_without_any_checkpoint_is_refused_with_the_reason(tmp_path: Path) -> None:
    train_run(tiny_recipe(tmp_path, "max_steps=2"))
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(UserError, match=r"SYS005.*no intact checkpoint"):
        train_run(None, resume=str(tmp_path / "run"))
    with pytest.raises(UserError, match="SYS005"):
        train_run(None, resume=str(tmp_path / "nowhere"))


def test_resume_with_another_set_of_parameters_is_refused(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "max_steps=4", "freeze=['*embed_tokens*']")
    train_run(tiny_recipe(tmp_path, "max_steps=2"))
    with pytest.raises(UserError, match=r"(?s)SYS021.*freeze: was \[\], now"):
        train_run(recipe, resume=str(tmp_path / "run"))


def test_an_output_folder_that_holds_something_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("mine")
    with pytest.raises(UserError, match=r"SYS003.*precious"):
        train_run(tiny_recipe(tmp_path, "max_steps=2"))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["precious"]
    train_run(tiny_recipe(tmp_path, "max_steps=2", "overwrite_output_dir=true"))
    assert (tmp_path / "run.old-1" / "precious").read_text() == "mine"


def test_an_output_folder_that_is_a_file_or_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match="SYS004"):
        train_run(tiny_recipe(tmp_path, "max_steps=2"))
    with pytest.raises(UserError, match="SYS004"):
        train_run(tiny_recipe(tmp_path, "max_steps=2", f"output_dir={tmp_path / 'run' / 'deeper'}"))


def test_a_run_that_cannot_start_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        train_run(tiny_recipe(tmp_path, f"data.train={tmp_path / 'missing.jsonl'}"))
    assert not (tmp_path / "run").exists()


def full_disk(*_args: object, **_kw: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_at_a_checkpoint_is_a_finding_and_the_run_goes_on(tmp_path: Path, monkeypatch) -> None:
    session = open_run(tiny_recipe(tmp_path, "max_steps=6", "save_steps=2", "save_in_background=false"))
    real = checkpoint.save_file
    calls: list[int] = []

    def once_full(*args: object, **kw: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            full_disk()
        real(*args, **kw)

    monkeypatch.setattr(checkpoint, "save_file", once_full)
    result = session.run()
    assert (result.status, result.findings["SYS015"]) == ("finished", 1)
    run = tmp_path / "run"
    assert sorted(p.name for p in run.glob("*checkpoint*")) == ["checkpoint-2", "checkpoint-5", "checkpoint-6"]
    assert all(verify_manifest(p) == [] for p in run.glob("checkpoint-*"))


def test_a_full_disk_at_the_end_halts_and_names_the_last_checkpoint(tmp_path: Path, monkeypatch) -> None:
    from finitune.train import session as sessions

    session = open_run(tiny_recipe(tmp_path, "max_steps=3"))
    monkeypatch.setattr(sessions, "write_model", full_disk)
    result = session.run()
    assert (result.status, result.exit_code) == ("halted", 3)
    assert "SYS002" in result.halted
    assert "checkpoint-3" in result.halted
    monkeypatch.undo()
    again = train_run(None, resume=str(tmp_path / "run"))
    assert (again.status, again.steps) == ("finished", 3)


def test_a_journal_that_cannot_be_written_halts_at_the_last_good_step(tmp_path: Path, monkeypatch) -> None:
    session = open_run(tiny_recipe(tmp_path, "max_steps=6"))
    real = session.journal.write

    def full_at_three(kind: str, **record: object) -> None:
        if record.get("step") == 3:
            full_disk()
        real(kind, **record)

    monkeypatch.setattr(session.journal, "write", full_at_three)
    result = session.run()
    assert (result.status, result.exit_code) == ("halted", 3)
    assert "SYS010" in result.halted


def test_a_halted_run_keeps_its_last_good_state_and_can_go_on(tmp_path: Path) -> None:
    session = open_run(tiny_recipe(tmp_path, "max_steps=20", "guard.max_aborts_in_a_row=3"))
    port = session.prepared.port
    poison_output(port.parts.model.get_submodule("model.layers.0.mlp.down_proj"), at_step(port, *range(6, 99)))
    result = session.run()
    assert (result.status, result.exit_code, result.updates, result.skipped) == ("halted", 3, 5, 1)
    assert "NUM104" in result.halted
    assert (tmp_path / "run" / "checkpoint-6").is_dir()
    assert train_run(None, resume=str(tmp_path / "run")).status == "finished"


def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    session = open_run(tiny_recipe(tmp_path, "max_steps=6", "save_steps=2"))
    port = session.prepared.port

    class Spoil:
        """Stands for a fault of the machine: a weight turns NaN after a good commit."""

        def on_step(self, event) -> None:
            if event.reading.step == 4:
                with torch.no_grad():
                    port.parts.parameters[0][1].view(-1)[0] = float("nan")

    session.observers._members.append(Spoil())
    result = session.run()
    assert result.status == "finished", "the next step fails, the weight is found and repaired"
    assert result.findings["NUM101"] == 1, "the save after step 4 was refused"
    saved = list((tmp_path / "run").glob("checkpoint-*"))
    assert "checkpoint-2" in [p.name for p in saved]
    for path in saved:
        assert all(bool(torch.isfinite(t).all()) for t in load_file(str(path / "model.safetensors")).values())


def test_an_observer_that_raises_is_named_and_left_out(tmp_path: Path) -> None:
    class Broken:
        def on_step(self, _event) -> None:
            raise RuntimeError("screen on fire")

    result = train_run(tiny_recipe(tmp_path, "max_steps=3"), observers=[Broken()])
    assert (result.status, result.findings["SYS009"]) == ("finished", 1)


def test_old_checkpoints_make_room_but_the_newest_and_the_trusted_stay(tmp_path: Path) -> None:
    """Trusted after 3 clean steps: at step 8 that is the one of step 4; 6 waits, 8 is the newest."""
    train_run(tiny_recipe(tmp_path, "max_steps=8", "save_steps=2", "save_total_limit=1", "guard.trust_steps=3"))
    left = {p.name: checkpoint.is_trusted(p) for p in (tmp_path / "run").glob("checkpoint-*")}
    assert left == {"checkpoint-4": True, "checkpoint-6": False, "checkpoint-8": False}


def test_numbers_reach_a_tracker(tmp_path: Path) -> None:
    train_run(tiny_recipe(tmp_path, "max_steps=3", "report_to=[csv]"))
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert rows[0] == "step,name,value"
    assert sum(",train/loss," in r for r in rows) == 3


def test_auto_folders_are_numbered(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folder.time, "strftime", lambda _f: "T")
    first = folder.choose("auto", "quickstart")
    first.mkdir(parents=True)
    assert [str(first), str(folder.choose("auto", "quickstart"))] == ["runs/quickstart-T", "runs/quickstart-T-2"]


def test_the_stored_recipe_writes_out_what_was_derived(tmp_path: Path, monkeypatch) -> None:
    recipe = tiny_recipe(tmp_path, "max_steps=-1", "num_train_epochs=0.1", "precision=auto", "device=auto")
    monkeypatch.chdir(tmp_path)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": ["rows.jsonl"]})})
    result = train_run(recipe)
    stored = load_recipe(str(tmp_path / "run" / "recipe.yaml"), [])
    assert stored.max_steps == result.steps
    assert stored.data.train == [str(tmp_path / "rows.jsonl")]
    assert (stored.precision in ("fp32", "bf16"), stored.device) == (True, "cpu")
    assert stored.model.name_or_path == "tiny-llama"


def test_the_summary_counts_what_was_found_in_steps(tmp_path: Path) -> None:
    session = open_run(tiny_recipe(tmp_path, "max_steps=8"))
    port = session.prepared.port
    poison_output(port.parts.model.get_submodule("model.layers.0.mlp.down_proj"), at_step(port, 2, 6))
    result = session.run()
    assert result.findings["NUM001"] == 2
    assert (result.skipped, result.updates) == (2, 6)


def test_a_tracker_without_its_package_is_refused_before_anything_starts(tmp_path: Path, monkeypatch) -> None:
    from finitune.train import trackers_of

    monkeypatch.setattr(trackers_of, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"SYS011.*tensorboard"):
        train_run(tiny_recipe(tmp_path, "max_steps=2", "report_to=[tensorboard]"))
    assert not (tmp_path / "run").exists()


def test_a_held_out_loss_that_is_not_finite_is_found_and_changes_nothing(tmp_path: Path) -> None:
    session = open_run(tiny_recipe(tmp_path, "max_steps=3"))
    module = session.prepared.port.parts.model.get_submodule("model.layers.0.mlp.down_proj")
    handle = module.register_forward_hook(
        lambda _m, _a, out: None if torch.is_grad_enabled() else torch.full_like(out, float("nan"))
    )
    result = session.run()
    handle.remove()
    assert (result.status, result.updates) == ("finished", 3)
    assert result.findings["NUM102"] == 2
    assert all(bool(torch.isfinite(t).all()) for _, t in session.prepared.port.state_tensors())


@pytest.mark.parametrize("count", [1, 20])
def test_copies_of_one_row_train_without_a_held_out_part(tmp_path: Path, count: int) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * count)
    result = train_run(tiny_recipe(tmp_path, "max_steps=2"))
    assert (result.status, result.eval_after) == ("finished", None)
