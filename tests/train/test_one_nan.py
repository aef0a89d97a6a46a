"""The demonstration: one non-finite forward at step 10 of 24, in the HF Trainer and here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import one_nan


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory):
    return one_nan.batches_of(tmp_path_factory.mktemp("plan") / "run")


@pytest.mark.filterwarnings("ignore")
def test_the_hf_trainer_ends_with_every_tensor_dead_and_its_checkpoints_poisoned(tmp_path: Path, batches) -> None:
    row = one_nan.hf(tmp_path, batches, torch.float32, True)
    assert row["bad tensors"] == "21 of 21"
    assert row["poisoned checkpoints"] == "2 of 2"


@pytest.mark.parametrize("precision", ["fp32", "bf16-emulated"])
def test_here_the_step_is_refused_and_the_run_ends_within_one_percent(tmp_path: Path, precision: str) -> None:
    clean = one_nan.ours(tmp_path / "clean", precision, False)
    hurt = one_nan.ours(tmp_path / "hurt", precision, True)
    assert hurt["bad tensors"] == "0 of 21"
    assert hurt["poisoned checkpoints"] == "0 of 3"
    assert hurt["refused"] == "step 10 (4 rows)"
    assert hurt["exit"] == 0
    assert hurt["last logged loss"] == pytest.approx(clean["last logged loss"], rel=0.01)


@pytest.mark.filterwarnings("ignore")
def test_both_trainers_are_the_same_training_while_nothing_goes_wrong(tmp_path: Path, batches) -> None:
    theirs = one_nan.hf(tmp_path / "hf", batches, torch.float32, False)
    ours = one_nan.ours(tmp_path / "ours", "fp32", False)
    assert ours["last logged loss"] == pytest.approx(theirs["last logged loss"], rel=2e-3)
