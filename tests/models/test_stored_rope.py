"""Frequencies that a checkpoint holds are compared with what config.json makes of them, and nothing else is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finitune.models.load import load
from finitune.models.save import save_model
from finitune.models.stored_rope import base_of
from finitune.models.tiny import TinySpec, write_internlm2_folder
from finitune.models.weights import WEIGHTS

DIM = 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    loaded = load("tiny-llama:hidden=32,layers=2,heads=2")
    save_model(loaded.model, loaded.tokenizer, tmp_path / "llama", family=loaded.family)
    return tmp_path / "llama"


def powers(base: float, dim: int = DIM) -> torch.Tensor:
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def hold(folder: Path, frequencies: torch.Tensor, layers: int = 2, part: str = "self_attn") -> None:
    state = load_file(str(folder / WEIGHTS))
    state = {k: v.clone() for k, v in state.items()}
    state |= {f"model.layers.{n}.{part}.rotary_emb.inv_freq": frequencies.clone() for n in range(layers)}
    save_file(state, str(folder / WEIGHTS), metadata={"format": "pt"})


def configure(folder: Path, **rope: Any) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.setdefault("rope_parameters", {}).update(rope)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def told(folder: Path) -> list[Any]:
    return [f for f in load(str(folder)).report.findings if f.code == "MOD042"]


@pytest.mark.parametrize("factor", [0.25, 1.05, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_base_than_that_of_the_file_is_told(folder: Path, factor: float, dtype: torch.dtype) -> None:
    hold(folder, powers(1e4).to(dtype))
    configure(folder, rope_theta=1e4 * factor)
    (found,) = told(folder)
    assert found.where == "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert found.data["count"] == 2
    assert float(found.data["stored_base"]) == pytest.approx(1e4, rel=0.02)
    assert float(found.data["base"]) == pytest.approx(1e4 * factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("base", [1e4, 5e5, 1e6])
def test_the_same_base_is_silent_in_any_format(folder: Path, base: float, dtype: torch.dtype) -> None:
    hold(folder, powers(base).to(dtype))
    configure(folder, rope_theta=base)
    assert told(folder) == []


@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 4.0}, {"rope_type": "dynamic", "factor": 2.0}])
def test_scaled_and_unscaled_frequencies_are_both_right(folder: Path, scaling: dict[str, Any]) -> None:
    configure(folder, rope_theta=1e4, **scaling)
    hold(folder, powers(1e4))
    assert told(folder) == []
    hold(folder, load(str(folder)).model.model.rotary_emb.inv_freq)
    assert told(folder) == []


def test_a_scaling_that_the_configuration_has_lost_is_told(folder: Path) -> None:
    scaled = powers(1e4)
    scaled[4:] /= 8.0  # as llama3 and yarn scale: only the slow ones
    hold(folder, scaled)
    (found,) = told(folder)
    assert found.data["stored_base"] == "-"
    assert found.data["index"] >= 4


def test_frequencies_of_another_length_are_told(folder: Path) -> None:
    hold(folder, powers(1e4, 2 * DIM))
    assert len(told(folder)) == 1


def test_the_original_layout_of_internlm2_is_read_too(tmp_path: Path) -> None:
    folder = write_internlm2_folder(tmp_path, spec=TinySpec())
    model = load(str(folder)).model
    right = model.model.rotary_emb.inv_freq
    hold(folder, right, part="attention")
    assert told(folder) == []
    hold(folder, right * 0.5, part="attention")
    assert len(told(folder)) == 1


def test_a_checkpoint_without_frequencies_says_nothing(folder: Path) -> None:
    configure(folder, rope_theta=123.0)
    assert told(folder) == []


def test_the_base_is_known_of_powers_only() -> None:
    assert base_of(powers(5e5)) == pytest.approx(5e5, rel=1e-3)
    assert base_of(powers(1e4) * torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 2])) is None
    assert base_of(torch.full((4,), float("nan"))) is None
    assert base_of(torch.ones(1)) is None
