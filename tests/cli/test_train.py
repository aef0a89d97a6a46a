"""``finitune train``: arguments, overrides, resume, dry run; the training itself is a stand-in."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest

from finitune.cli.render import plain
from finitune.cli.train import Request, finding_blocks, sort_arguments
from finitune.core.errors import UserError
from finitune.train.codes import BAD_OVERRIDE
from finitune.train.codes_conflicts import PURE_FP16
from finitune.train.recipe import Recipe
from finitune.train.recipe_io import load_recipe, to_yaml


@dataclass
class Trainer:
    """Remembers what it was asked for; ``status`` is how the run ends."""

    status: str = "finished"
    calls: list = field(default_factory=list)

    def train_run(self, recipe, *, resume=None, allow_changes=False, observers=(), name="run"):
        asked = {"resume": resume, "allow_changes": allow_changes}
        self.calls.append(SimpleNamespace(recipe=recipe, observers=observers, name=name, **asked))
        halted = "NUM001 the loss is not finite" if self.status == "halted" else None
        return SimpleNamespace(
            exit_code=3 if halted else 0, halted=halted, run_dir="runs/x", to_json=lambda: {"status": self.status}
        )

    def plan_run(self, recipe, *, resume=None, allow_changes=False):
        self.calls.append(SimpleNamespace(recipe=recipe, resume=resume, allow_changes=allow_changes))
        derived = (SimpleNamespace(name="device", value="cpu", why="the only one"),)
        plan = SimpleNamespace(
            derived=derived, total_steps=60, step_s=1.5, memory_bytes=2**30, available_bytes=2**31, facts={"n": 1}
        )
        return plan, []


@pytest.fixture
def trainer(monkeypatch):
    stand_in = Trainer()
    module = ModuleType("finitune.train.run")
    module.train_run, module.plan_run = stand_in.train_run, stand_in.plan_run
    monkeypatch.setitem(sys.modules, "finitune.train.run", module)
    return stand_in


def test_without_arguments_quickstart_is_trained(cli, trainer):
    assert cli("train").code == 0
    assert trainer.calls[0].recipe == load_recipe("quickstart")
    assert (trainer.calls[0].name, trainer.calls[0].resume) == ("quickstart", None)
    assert len(trainer.calls[0].observers) == 1


def test_overrides_without_a_recipe_change_quickstart(cli, trainer):
    cli("train", "learning_rate=1e-4", "lora.r=4")
    recipe = trainer.calls[0].recipe
    assert (recipe.learning_rate, recipe.lora.r, recipe.max_steps) == (1e-4, 4, 60)


def test_a_file_with_overrides(cli, trainer, tmp_path):
    (tmp_path / "my.yaml").write_text("data: {train: rows.jsonl}\n")
    cli("train", "my.yaml", "seed=7", "data.train=[a.jsonl, b.jsonl]")
    recipe = trainer.calls[0].recipe
    assert (recipe.seed, recipe.data.train) == (7, ["a.jsonl", "b.jsonl"])
    assert trainer.calls[0].name == "my"


def test_json_prints_the_result_and_no_progress(cli, trainer):
    ran = cli("train", "--json")
    assert ran.record["result"] == {"status": "finished"}
    assert trainer.calls[0].observers == ()


def test_a_run_that_the_guard_stopped_is_exit_code_3(cli, trainer):
    trainer.status = "halted"
    assert cli("train").code == 3
    record = cli("train", "--json").record
    assert (record["ok"], record["exit_code"]) == (False, 3)
    assert record["errors"] == [{"code": "NUM001", "where": "runs/x", "message": "NUM001 the loss is not finite"}]


def test_resume_takes_the_stored_recipe(cli, trainer, tmp_path):
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(to_yaml(Recipe(seed=5)))
    (run / "journal.jsonl").write_text("")
    cli("train", "--resume", str(run))
    cli("train", "--resume", "latest", "max_steps=9")
    first, second = trainer.calls
    assert (first.resume, first.recipe) == (str(run), Recipe(seed=5))
    assert (second.resume, second.recipe) == ("latest", Recipe(seed=5, max_steps=9))


def test_resume_with_a_recipe_takes_that_recipe(cli, trainer):
    cli("train", "quickstart", "--resume", "somewhere")
    assert trainer.calls[0].recipe == load_recipe("quickstart")


def stored_run(folder, recipe):
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    return str(folder)


def test_changes_are_allowed_only_together_with_resume(cli, trainer, tmp_path):
    run = stored_run(tmp_path / "a", Recipe(seed=5))
    ran = cli("train", "--allow-changes")
    assert (ran.code, trainer.calls) == (2, [])
    assert ran.err.startswith("CFG060")
    assert "--resume" in ran.err
    assert "--resume" in cli("train", "--allow-changes", "--lang", "zh").err
    cli("train", "--resume", run, "--allow-changes", "seed=6")
    cli("train", "--resume", run, "seed=6")
    assert [c.allow_changes for c in trainer.calls] == [True, False]
    assert trainer.calls[0].recipe.seed == 6


def test_epochs_given_with_resume_win_over_the_stored_number_of_steps(cli, trainer, tmp_path):
    run = stored_run(tmp_path / "a", Recipe(max_steps=7))
    cli("train", "--resume", run, "num_train_epochs=3")
    cli("train", "--resume", run, "num_train_epochs=3", "max_steps=9")
    assert [(c.recipe.num_train_epochs, c.recipe.max_steps) for c in trainer.calls] == [(3.0, -1), (3.0, 9)]


def test_a_dry_run_of_a_resume_asks_for_the_plan_of_the_resume(cli, trainer, tmp_path):
    run = stored_run(tmp_path / "a", Recipe(seed=5))
    assert "the only one" in cli("train", "--resume", run, "--dry-run").out
    assert [(c.resume, c.allow_changes) for c in trainer.calls] == [(run, False)]
    assert not hasattr(trainer.calls[0], "observers")


def test_a_dry_run_without_a_plan_tells_the_findings_alone(cli, trainer, tmp_path, monkeypatch):
    run = stored_run(tmp_path / "a", Recipe())
    found = [BAD_OVERRIDE.find("here", override="x", reason="y")]
    monkeypatch.setattr(sys.modules["finitune.train.run"], "plan_run", lambda _recipe, **_asked: (None, found))
    assert cli("train", "--resume", run, "--dry-run").out.startswith("CFG010")
    record = cli("train", "--resume", run, "--dry-run", "--json").record
    assert (record["plan"], [f["code"] for f in record["findings"]]) == (None, ["CFG010"])


def test_resume_of_nothing_is_a_user_error(cli, trainer):
    ran = cli("train", "--resume", "nowhere")
    assert (ran.code, trainer.calls) == (2, [])
    assert "nowhere" in ran.err


def test_a_dry_run_tells_the_plan_and_does_not_train(cli, trainer):
    ran = cli("train", "--dry-run")
    assert ran.code == 0
    assert "the only one" in ran.out
    assert "1.5 min" in ran.out
    assert not [c for c in trainer.calls if hasattr(c, "observers")]
    plan = cli("train", "--dry-run", "--json").record["plan"]
    assert plan["derived"] == [{"name": "device", "value": "cpu", "why": "the only one"}]
    assert plan["total_steps"] == 60


def test_of_many_like_findings_the_first_few_are_shown():
    many = [BAD_OVERRIDE.find(f"row {n}", override=n, reason="x") for n in range(10)]
    shown = plain(finding_blocks([*many, PURE_FP16.find("precision", value="half")]))
    assert [f"[row {n}]" in shown for n in range(6)] == [True] * 4 + [False] * 2
    assert "6 more of CFG010" in shown
    assert shown.count("CFG013") == 1


def test_all_faults_of_a_recipe_are_told_and_nothing_is_trained(cli, trainer, tmp_path):
    (tmp_path / "my.yaml").write_text("learning_rate: 0\nlora_rank: 3\nfp16: true\nbf16: true\n")
    ran = cli("train", "my.yaml", "--json")
    assert [e["code"] for e in ran.record["errors"]] == ["CFG007", "CFG005", "CFG011"]
    assert (ran.code, trainer.calls) == (2, [])


BAD = [
    (["nope.yaml"], "CFG001"),
    (["."], "CFG002"),
    (["empty.yaml"], "CFG004"),
    (["broken.yaml"], "CFG003"),
    (["quickstart", "tiny-internlm2"], "CFG061"),
    (["--learning_rate=1"], "CFG010"),
    (["--learning-rate", "1"], "CFG060"),
    (["learning_rate", "=", "1e-4"], "CFG061"),
    (["learning_rate=fast"], "CFG006"),
]


@pytest.mark.parametrize(("words", "code"), BAD)
def test_bad_input_is_one_clear_message_and_exit_code_2(cli, trainer, tmp_path, words, code):
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    ran = cli("train", *words)
    assert (ran.code, ran.out, trainer.calls) == (2, "", [])
    assert ran.err.startswith(code)
    assert ran.err.count(code) == 1


def test_sorting_arguments(tmp_path):
    assert sort_arguments(["a=1", "my.yaml", "b=2"]) == Request("my.yaml", ("a=1", "b=2"))
    long = f"sample.prompts=[{'x' * 5000}]"
    assert sort_arguments([long]) == Request(None, (long,))
    odd = tmp_path / "lr=1.yaml"
    odd.write_text("seed: 1\n")
    assert sort_arguments([str(odd)]) == Request(str(odd), ())
    with pytest.raises(UserError):
        sort_arguments(["a", "b"])
