"""A step under dynamic RoPE is a function of the step alone, whatever sequences came before it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finitune.models import load as loading
from finitune.models.load import load
from finitune.models.rope import forget_lengths
from finitune.models.tiny import TinySpec, write_internlm2_folder


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models as transformers makes them: loading leaves them alone."""
    monkeypatch.setattr(loading, "forget_lengths", lambda _model: 0)


def model_of(folder: Path, kind: str = "dynamic"):
    scaling = {"type": kind, "factor": 2.0}
    return load(str(write_internlm2_folder(folder, spec=TinySpec(positions=16), rope_scaling=scaling))).model


def logits(model, length: int) -> torch.Tensor:
    ids_BT = torch.arange(length).remainder(100).unsqueeze(0)
    with torch.no_grad():
        return model(input_ids=ids_BT, use_cache=False).logits


@pytest.mark.parametrize("before", [8, 17, 40])
@pytest.mark.parametrize("length", [8, 16, 17, 30])
def test_the_numbers_do_not_depend_on_earlier_sequences(tmp_path: Path, before: int, length: int) -> None:
    expected = logits(model_of(tmp_path), length)
    model = model_of(tmp_path)
    logits(model, before)
    assert torch.equal(logits(model, length), expected)


@pytest.mark.usefixtures("bare")
def test_without_it_they_do(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    first = logits(model, 30)
    logits(model, 40)
    assert not torch.equal(logits(model, 30), first)


@pytest.mark.usefixtures("bare")
def test_other_kinds_are_left_alone(tmp_path: Path) -> None:
    assert forget_lengths(model_of(tmp_path / "dynamic")) == 1
    assert forget_lengths(model_of(tmp_path, "linear")) == 0
