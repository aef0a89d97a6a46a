"""The same transactions on an accelerator, where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finitune.engine.policy import Action
from finitune.numerics.digest import digest
from finitune.train.run import open_run, train_run
from support.faults import at_step, poison_output
from support.runs import loop_of, ready, tiny_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="torch finds no accelerator on this machine"),
]


@pytest.mark.parametrize("precision", ["auto", "fp32", "fp16", "bf16-pure"])
def test_a_run_trains_and_stays_finite(tmp_path: Path, precision: str) -> None:
    result = train_run(tiny_recipe(tmp_path, "device=auto", f"precision={precision}", "max_steps=6"))
    assert (result.status, result.skipped) == ("finished", 0)
    assert result.eval_after < result.eval_before


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_abort_is_the_identity(tmp_path: Path, precision: str) -> None:
    prepared = ready(tmp_path, "device=auto", f"precision={precision}")
    port = prepared.port
    loop = loop_of(prepared, tmp_path)
    while port.state.updates < 3:
        loop.one()
    step = port.state.step + 1
    poison_output(port.parts.model.get_submodule("model.layers.0.mlp.down_proj"), at_step(port, step))
    before = digest(port.state_tensors())
    assert loop.one() is Action.SKIP_BATCH
    assert digest(port.state_tensors()) == before


def test_a_resumed_run_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    whole = train_run(tiny_recipe(tmp_path, "device=auto", "max_steps=6", f"output_dir={tmp_path / 'whole'}"))
    train_run(tiny_recipe(tmp_path, "device=auto", "max_steps=6", "save_steps=3", "save_total_limit=9"))
    last = tmp_path / "run" / "checkpoint-6"
    (last / "manifest.json").unlink()
    resumed = open_run(None, resume=str(tmp_path / "run"))
    assert resumed.prepared.port.state.step == 3
    assert resumed.run().train_loss == pytest.approx(whole.train_loss, rel=1e-4)
