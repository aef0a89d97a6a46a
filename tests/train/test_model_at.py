"""The model of a stored run after any step, from its folder alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from finitune.cli.main import main
from finitune.core.errors import UserError
from finitune.numerics.digest import digest
from finitune.train.model_at import model_at
from finitune.train.run import open_run, train_run
from support.runs import tiny_recipe


def folder_digest(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("kind", ["lora={r: 4, lora_dropout: 0.1}", "lora=null"])
def test_the_state_of_a_step_between_checkpoints_is_rebuilt_and_the_run_is_left_alone(tmp_path: Path, kind) -> None:
    session = open_run(tiny_recipe(tmp_path, "max_steps=8", "save_steps=3", "save_total_limit=9", kind))
    port, after, truth = session.prepared.port, session._after_step, {}

    def remember(step: int, step_s: float) -> None:
        truth[step] = digest(port.state_tensors(), port.state_record())
        after(step, step_s)

    session._after_step = remember
    session.run()
    before = folder_digest(tmp_path / "run")
    for step, base in ((2, 0), (5, 3), (8, 8)):
        found = model_at(str(tmp_path / "run"), step)
        there = found.prepared.port
        assert (found.arrival.base_step, found.arrival.num_redone) == (base, step - base)
        assert digest(there.state_tensors(), there.state_record()) == truth[step]
    assert folder_digest(tmp_path / "run") == before


def test_export_of_a_step_gives_the_model_that_a_shorter_run_would_have_given(tmp_path: Path, capsys) -> None:
    """With a constant rate a run of 5 steps is the first half of one of 10."""
    same = ("lr_scheduler_type=constant", "warmup_ratio=0")
    train_run(tiny_recipe(tmp_path, "max_steps=10", *same))
    train_run(tiny_recipe(tmp_path, "max_steps=5", *same, f"output_dir={tmp_path / 'short'}"))
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "run"), str(out), "--step", "5", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["step"], record["base_step"], record["num_redone"]) == (5, 0, 5)
    ours, theirs = (load_file(str(f / "model.safetensors")) for f in (out, tmp_path / "short" / "final"))
    assert digest(sorted(ours.items())) == digest(sorted(theirs.items()))


def test_a_step_that_never_was_and_a_run_that_is_none_are_refused(tmp_path: Path) -> None:
    train_run(tiny_recipe(tmp_path, "max_steps=3"))
    with pytest.raises(UserError, match=r"SYS012.*step 4"):
        model_at(str(tmp_path / "run"), 4)
    with pytest.raises(UserError, match="SYS005"):
        model_at(str(tmp_path / "nowhere"), 1)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--step", "99"]) == 2
    assert not (tmp_path / "out").exists()
