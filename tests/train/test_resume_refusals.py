"""Going on with what is no run, not whole, in use, or not to be changed: told, and nothing lost."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from finitune.cli.main import main
from finitune.core.errors import UserError, UserErrors
from finitune.core.journal import Journal
from finitune.train import lock, session
from finitune.train.folder import find_place
from finitune.train.run import plan_run, train_run
from support.killed import content, edit_state, records, refused, resume, said, sign, weights
from support.runs import tiny_recipe

pytestmark = pytest.mark.usefixtures("quick_plan", "open_sessions")


# --- Names ------------------------------------------------------------------------------------------------------------


def places(home: Path) -> dict[str, tuple[Path, str]]:
    for name in ("empty", "other", "early", "run", "run/final", "run/checkpoint-3", "run/checkpoint-x"):
        (home / name).mkdir(parents=True)
    (home / "other" / "notes.txt").touch()
    (home / "early" / "journal.jsonl").touch()
    (home / "locked").mkdir()
    (home / "locked" / ".lock").touch()
    (home / "run" / "recipe.yaml").touch()
    return {
        "absent": (home / "nowhere", "nothing is there"),
        "absent part": (home / "run" / "checkpoint-9", "the run itself is"),
        "a file": (home / "other" / "notes.txt", "it is a file"),
        "empty": (home / "empty", "the folder is empty"),
        "no run": (home / "other", "no recipe.yaml beside notes.txt"),
        "not begun": (home / "early", "stopped before it began"),
        "locked": (home / "locked", "stopped before it began"),
        "part": (home / "run" / "final", "no checkpoint of it; the run itself is"),
        "no number": (home / "run" / "checkpoint-x", "no checkpoint of it; the run itself is"),
        "impossible": (Path("a\0b"), "nothing is there"),
        "endless": (Path("x" * 5000), "nothing is there"),
    }


def test_names_that_are_no_run_are_refused_with_the_reason(tmp_path):
    for name, (path, reason) in places(tmp_path).items():
        with pytest.raises(UserError) as caught:
            find_place(str(path))
        assert caught.value.code.code == "SYS005", name
        assert reason in str(caught.value), name
    assert find_place(str(tmp_path / "run" / "checkpoint-3")).chosen == tmp_path / "run" / "checkpoint-3"
    assert find_place(str(tmp_path / "run") + "/").chosen is None


def test_latest_is_the_run_that_was_written_to_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run was found"):
        find_place("latest")
    for name, time_s in (("old", 100), ("new", 300), ("middle", 200)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        for file in ("recipe.yaml", "journal.jsonl"):
            (tmp_path / "runs" / name / file).touch()
            os.utime(tmp_path / "runs" / name / file, (time_s, time_s))
    (tmp_path / "runs" / "not begun").mkdir()
    (tmp_path / "runs" / "not begun" / "journal.jsonl").touch()
    assert find_place("latest").run_dir == Path("runs/new")
    (tmp_path / "runs" / "new" / "recipe.yaml").unlink()
    assert find_place("latest").run_dir == Path("runs/middle")


# --- Hostile content --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code"), [("a: [", "CFG003"), ("", "CFG004"), ("learning_rat: 3\nseed: x\n", "CFG005"), ("\0", "CFG003")]
)
def test_a_stored_recipe_that_is_broken_is_a_recipe_error(tmp_path, full, text, code):
    run = full.again(tmp_path)
    (run / "recipe.yaml").write_text(text)
    assert code in refused(run)


def test_rows_or_a_model_that_are_gone_are_named(tmp_path, lora):
    run = lora.again(tmp_path)
    message = refused(run, f"data.train={tmp_path / 'gone.jsonl'}", "learning_rate=5e-4", "lora.lora_alpha=9")
    assert "gone.jsonl" in message
    assert "learning_rate: was 0.001, now 0.0005" in message, "everything at once"
    assert "lora.lora_alpha" in message
    assert "MOD001" in refused(run, f"model.name_or_path={tmp_path / 'gone'}")


STATES = {
    "a foreign schema": {"schema": 99},
    "another step": {"step": 5},
    "no cursor": {"cursor": None},
    "a cursor outside": {"cursor": {"epoch": 0, "step": 10**6}},
    "a negative epoch": {"cursor": {"epoch": -1, "step": 0}},
    "a negative count": {"updates": -3},
    "no number": {"updates": "many"},
    "not finite": {"loss_sum": "NaN"},
    "no history": {"history": []},
}


@pytest.mark.parametrize("harm", STATES)
def test_a_state_that_is_not_of_this_run_is_refused(tmp_path, full, harm):
    run = full.again(tmp_path)
    edit_state(run / "checkpoint-4", **STATES[harm])
    message = refused(run)
    assert message.startswith("SYS005")
    assert "its state does not fit" in message


def test_moments_of_another_optimizer_are_refused_before_a_step_fails(tmp_path, full):
    from safetensors.torch import load_file, save_file

    run = full.again(tmp_path)
    path = run / "checkpoint-4" / "optimizer.safetensors"
    save_file({k: v for k, v in load_file(path).items() if not k.endswith("exp_avg_sq")}, path)
    sign(run / "checkpoint-4")
    assert "exp_avg, step" in refused(run)
    path.write_bytes(b"no tensors")
    sign(run / "checkpoint-4")
    assert refused(run).startswith("SYS005")


@pytest.mark.parametrize(
    "facts",
    [
        None,
        [],
        "text",
        {"recipe": 3, "data": [], "versions": "x", "device": {"type": {}}, "threads": None},
        {"recipe": {"learning_rate": "?", "lora": 5, "no_such_field": 1}, "total_steps": "8", "changes": 3},
    ],
)
def test_facts_of_the_wrong_kind_are_not_recorded_or_refused_never_a_crash(tmp_path, full, facts):
    run = full.again(tmp_path)
    sign(run / "checkpoint-4", facts=facts)
    with contextlib.suppress(UserError, UserErrors):
        assert resume(run).status == "finished"
    if not isinstance(facts, dict):
        assert weights(run) == weights(full.whole), "the journal has the facts as well"


def test_without_any_recorded_facts_it_says_what_it_cannot_tell(tmp_path, full):
    run = full.again(tmp_path)
    sign(run / "checkpoint-4", facts={})
    (run / "journal.jsonl").unlink()
    assert "learning_rate: was 0.001, now 0.0005" in refused(run, "learning_rate=5e-4"), "recipe.yaml is still there"
    assert resume(run).status == "finished"
    (unknown,) = said(run, "SYS023")["changes"]
    assert "data.digest" in unknown
    assert "was not recorded" in unknown


def test_a_journal_of_rubbish_tells_nothing_and_stops_nobody(tmp_path, full):
    run = full.again(tmp_path)
    (run / "journal.jsonl").write_bytes(b'\xff\xfe\n{"kind": "step"}\n[]\n{"kind": "start", "step": "x"}\n{"kin')
    assert resume(run).status == "finished"
    assert weights(run) == weights(full.whole)


# --- The folder -------------------------------------------------------------------------------------------------------


def test_a_run_that_somebody_trains_is_not_touched(tmp_path, full):
    run = full.again(tmp_path)
    give_back = lock.hold(run)
    before = content(run)
    for act in (lambda: resume(run), lambda: plan_run(None, resume=str(run))):
        with pytest.raises(UserError, match="SYS030"):
            act()
    with pytest.raises(UserError, match="SYS030"):
        train_run(tiny_recipe(tmp_path, "overwrite_output_dir=true"))
    assert content(run) == before
    give_back()
    assert resume(run).status == "finished"
    assert not lock.in_use(run)


def test_what_killed_writers_left_is_mended_first(tmp_path, full):
    run = full.again(tmp_path)
    os.rename(run / "checkpoint-4", run / ".checkpoint-4.1-0123abcd.old")
    (run / ".checkpoint-6.1-0123abcd.tmp").mkdir()
    assert resume(run).status == "finished"
    assert said(run, "SYS026")["point"] == "checkpoint-4"
    assert not list(run.glob(".checkpoint*"))
    assert len(records(run, "swept")[0]["done"]) == 2


def test_a_run_that_was_killed_before_it_had_a_recipe_leaves_its_folder_free(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in (".lock", ".writable", ".recipe.yaml.77-0123abcd.tmp"):
        (run / name).touch()
    assert train_run(tiny_recipe(tmp_path, "max_steps=1")).status == "finished"
    assert not [p.name for p in run.glob(".*") if p.name != ".writable"]


def test_a_dry_run_tells_the_point_and_the_changes_and_writes_nothing(tmp_path, full, capsys):
    run = full.again(tmp_path)
    before = content(run)
    assert main(["train", "--resume", str(run), "max_steps=20", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "goes on after step 4 of 20 (checkpoint-4)" in out
    assert "SYS025" in out
    assert main(["train", "--resume", str(run), "seed=1", "--dry-run"]) == 2
    assert "seed: was 42, now 1" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "seed=1", "--allow-changes", "--dry-run"]) == 0
    assert "SYS022" in capsys.readouterr().out
    assert content(run) == before


def test_a_disk_that_refuses_the_first_write_is_an_error_and_the_lock_is_given_back(tmp_path, full, monkeypatch):
    run = full.again(tmp_path)

    def full_disk(self, *_args, **_kw) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "__init__", full_disk)
    with pytest.raises(UserError, match=r"SYS004.*No space left"):
        resume(run)
    with pytest.raises(UserError, match=r"SYS004.*No space left"):
        train_run(tiny_recipe(tmp_path, f"output_dir={tmp_path / 'new'}"))
    assert not lock.in_use(run)
    assert not lock.in_use(tmp_path / "new")
    monkeypatch.undo()
    assert resume(run).status == "finished"


def test_an_error_in_the_middle_of_a_run_gives_the_lock_back(tmp_path, full, monkeypatch):
    run = full.again(tmp_path)
    monkeypatch.setattr(session.Session, "_train", lambda _self, _stop: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        resume(run)
    assert not lock.in_use(run)
