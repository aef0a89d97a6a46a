"""A frozen body that adds nothing is told at its smallest weight; a body that is trained, or adds something, is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from finitune.core.codes import all_codes, fill
from finitune.core.types import Finding
from finitune.engine.look.first_pass import FirstPass
from finitune.models.tiny import tiny_internlm2, tiny_llama

IDS = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(0))
SIZES = {"hidden": 32, "layers": 3, "heads": 2, "kv_heads": 2, "mlp": 64}


def looked(model: Any) -> tuple[Finding, ...]:
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    seen = FirstPass(model)
    with seen:
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return seen.findings(float(loss.detach()), trained)


def body(build: Any, factor: float, *, frozen: bool = True, only: str = "") -> Any:
    model = build(0, **SIZES).train()
    for name, parameter in model.named_parameters():
        inside = ".layers." in name and parameter.dim() > 1
        parameter.requires_grad_(not (inside and frozen))
        if inside and only in name:
            parameter.data.mul_(factor)
    return model


@pytest.mark.parametrize("build", [tiny_llama, tiny_internlm2])
@pytest.mark.parametrize("factor", [0.0, 0.02, 0.1])
def test_frozen_layers_of_too_small_a_scale_are_told(build: Any, factor: float) -> None:
    found = looked(body(build, factor))
    assert [(f.code, f.data["fault_class"]) for f in found] == [("MOD118", "H")]
    assert ".layers." in found[0].where
    assert found[0].data["percent"] < 10
    assert "{" not in fill(all_codes()["MOD118"].en.what, found[0].data)


def test_the_weight_that_lets_the_least_through_is_the_place() -> None:
    model = body(tiny_llama, 0.1)
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1e-3)
    assert [f.where for f in looked(model)] == ["model.layers.1.mlp.down_proj.weight"]


@pytest.mark.parametrize("build", [tiny_llama, tiny_internlm2])
def test_healthy_frozen_bodies_and_trained_ones_that_begin_with_nothing_are_silent(build: Any) -> None:
    assert looked(body(build, 1.0)) == ()
    assert looked(body(build, 0.0, frozen=False)) == ()


def test_adapters_on_a_healthy_body_are_silent() -> None:
    from peft import LoraConfig, get_peft_model

    made = get_peft_model(tiny_llama(0, **SIZES), LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    assert looked(made.train()) == ()


def test_layers_that_write_over_their_input_are_seen_to_add_something() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return x.add_(self.w(x))

    from finitune.engine.look.body import Bodies

    model = nn.ModuleDict({"layers": nn.ModuleList(Adds() for _ in range(2))}).requires_grad_(False)
    seen = Bodies(model)
    handles, x = list(seen.hooks()), torch.randn(4, 8)
    for layer in model["layers"]:  # type: ignore[attr-defined]
        x = layer(x)
    for handle in handles:
        handle.remove()
    assert seen.findings() == []
