"""The lean LoRA layer gives PEFT's numbers, steps aside for everything special, and leaves PEFT's folders alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finitune.models.families.llama import FAMILY
from finitune.models.lora import LoraSettings, attach
from finitune.models.lora_fused import _Adapted, _plain_adapter, fuse
from finitune.models.tiny import tiny_llama


def adapted(**settings: object):
    """A tiny model whose adapters are not zero."""
    model = attach(tiny_llama(0), LoraSettings(r=4, **settings), FAMILY)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def layers(model) -> list:
    from peft.tuners.lora.layer import Linear

    return [m for m in model.modules() if isinstance(m, Linear)]


def as_peft(model) -> None:
    for layer in layers(model):
        del layer.forward


def loss_and_gradients(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train()
    model.zero_grad()
    ids = torch.arange(60).reshape(2, 30) % 300
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_loss_and_gradients_are_those_of_peft() -> None:
    model = adapted()
    lean = loss_and_gradients(model)
    as_peft(model)
    plain = loss_and_gradients(model)
    torch.testing.assert_close(lean[0], plain[0], rtol=1e-6, atol=0)
    assert lean[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        torch.testing.assert_close(lean[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_derivatives_agree_with_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, grad: bool = True) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(grad)

    inputs = (random(2, 3, 5), random(7, 5, grad=False), random(7, grad=False), random(2, 5), random(7, 2), 0.7)
    assert torch.autograd.gradcheck(_Adapted.apply, inputs)


def test_every_plain_layer_is_lean() -> None:
    model = adapted()
    found = layers(model)
    assert len(found) == 14
    assert all(_plain_adapter(layer, torch.zeros(1, layer.in_features)) for layer in found)
    assert fuse(model) == 14


SPECIAL = {
    "dropout in training": lambda m, layer: m.train(),
    "another dtype": lambda m, layer: layer.base_layer.to(torch.bfloat16),
    "a trained base": lambda m, layer: layer.base_layer.requires_grad_(True),
    "a hook on the base": lambda m, layer: layer.base_layer.register_forward_hook(lambda *_: None),
    "adapters switched off": lambda m, layer: layer.enable_adapters(False),
    "merged": lambda m, layer: layer.merge(),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_whatever_is_special_takes_the_road_of_peft(kind: str) -> None:
    model = adapted(dropout=0.1).eval()
    layer = layers(model)[0]
    x = torch.zeros(1, layer.in_features)
    assert _plain_adapter(layer, x) is not None
    SPECIAL[kind](model, layer)
    assert _plain_adapter(layer, x) is None


def test_dora_and_autocast_take_the_road_of_peft() -> None:
    dora = layers(adapted(use_dora=True))[0]
    assert _plain_adapter(dora, torch.zeros(1, dora.in_features)) is None
    layer = layers(adapted())[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _plain_adapter(layer, torch.zeros(1, layer.in_features)) is None


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_goes_through(poison: float) -> None:
    layer = layers(adapted())[0]
    x = torch.zeros(1, layer.in_features)
    x[0, 0] = poison
    assert not torch.isfinite(layer(x)).all()


def test_the_saved_adapter_is_an_ordinary_one(tmp_path: Path) -> None:
    from peft import PeftModel

    model = adapted().eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(0), tmp_path).eval()
    ids = torch.arange(20).unsqueeze(0)
    torch.testing.assert_close(model(ids).logits, again(ids).logits, rtol=1e-5, atol=1e-6)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, again(ids).logits, rtol=1e-4, atol=1e-5)
