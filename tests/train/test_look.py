"""The look at a run of our own before its first step: what prepare() says of models that are not what they seem."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finitune.models.tiny import write_internlm2_folder
from finitune.train.prepare import prepare
from support.runs import ready, tiny_recipe

DOWN = "model.layers.0.feed_forward.w2.weight"


def told(
    folder: Path, change: Callable[[dict[str, Any]], None] | None = None, *overrides: str
) -> list[tuple[str, str]]:
    """Codes and fault classes of the look at a run over a checkpoint that was changed."""
    place = write_internlm2_folder(folder / "model")
    if change is not None:
        path = place / "model.safetensors"
        state = {name: tensor.clone() for name, tensor in load_file(str(path)).items()}
        change(state)
        save_file(state, str(path), metadata={"format": "pt"})
    found = ready(folder, *overrides, model=str(place)).findings
    return [(f.code, f.data["fault_class"]) for f in found if "fault_class" in f.data]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("lora.r=4",),
        ("lora.r=4", "lora.use_dora=true", "gradient_checkpointing=true"),
        ("precision=fp16-emulated",),
        ("data.packing=true", "gradient_accumulation_steps=4"),
        ("model.attn_implementation=eager",),
    ],
)
def test_a_healthy_run_gives_nothing_to_say(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    assert told(tmp_path, None, *overrides) == []


def zero_head(state: dict[str, Any]) -> None:
    state["output.weight"].zero_()


def hot_rows(state: dict[str, Any]) -> None:
    state["model.tok_embeddings.weight"][20:24] *= 1000.0


def beyond_half(state: dict[str, Any]) -> None:
    state[DOWN][3, 5] = 70000.0


@pytest.mark.parametrize(
    ("change", "overrides", "expected"),
    [
        (zero_head, (), ("MOD111", "H")),
        (zero_head, ("lora.r=4",), ("MOD111", "H")),
        (hot_rows, (), ("MOD113", "O")),
        (beyond_half, ("precision=fp16-emulated",), ("MOD116", "B")),
        (None, ("precision=bf16-pure", "learning_rate=1e-5"), ("OPT111", "J")),
    ],
)
def test_a_silent_fault_is_told_before_the_first_step(
    tmp_path: Path, change: Any, overrides: tuple[str, ...], expected: tuple[str, str]
) -> None:
    assert told(tmp_path, change, *overrides) == [expected]


def test_the_look_leaves_generators_gradients_and_modes_alone(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "lora.r=4", "lora.lora_dropout=0.1")

    def state(looked_at: bool) -> str:
        torch.manual_seed(7)
        port = prepare(recipe, looked_at=looked_at).port
        assert all(p.grad is None for p in port.model.parameters())
        trained = {n: p.sum().item() for n, p in port.parts.parameters}
        modes = [m.training for m in port.model.modules()]
        return json.dumps([torch.get_rng_state().sum().item(), trained, modes, port.state.record()], default=str)

    assert state(True) == state(False)
