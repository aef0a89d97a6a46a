"""Leaner elementwise parts: the same numbers and derivatives; variants and half precision keep their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finitune.models.lean import _RMSNorm, _SwiGLU, lean
from finitune.models.tiny import tiny_llama


def random(*shape: int, grad: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(grad)


def test_derivatives_agree_with_finite_differences() -> None:
    assert torch.autograd.gradcheck(_RMSNorm.apply, (random(2, 3, 5), random(5), 1e-5))
    assert torch.autograd.gradcheck(_RMSNorm.apply, (random(4, 5), random(5, grad=False), 1e-5))
    assert torch.autograd.gradcheck(_SwiGLU.apply, (random(3, 7), random(7, 3).t().detach().requires_grad_(True)))


def loss_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    ids = torch.arange(60).reshape(2, 30) % 300
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def test_a_llama_has_the_same_loss_and_gradients() -> None:
    model = tiny_llama(0)
    plain = loss_and_gradients(model)
    assert lean(model) == 2 * 3 + 1
    ours = loss_and_gradients(model)
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-6, atol=0)
    for name, gradient in plain[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_a_variant_keeps_its_own_forward() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.01

    gemma, odd = GemmaRMSNorm(8), OddRMSNorm(8)
    assert lean(nn.ModuleList([gemma, odd])) == 0
    other = tiny_llama(0)
    for layer in other.model.layers:
        layer.mlp.act_fn = nn.GELU()
    assert lean(other) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models_and_autocast_keep_their_own(dtype: torch.dtype) -> None:
    assert lean(tiny_llama(0).to(dtype)) == 0
    model, reference = tiny_llama(0), tiny_llama(0)
    lean(model)
    ids = torch.arange(20).unsqueeze(0)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(model(ids).logits, reference(ids).logits)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_goes_through(poison: float) -> None:
    model = tiny_llama(0)
    lean(model)
    norm, mlp = model.model.norm, model.model.layers[0].mlp
    x = torch.zeros(1, 64)
    x[0, 0] = poison
    assert not torch.isfinite(norm(x)).all()
    assert not torch.isfinite(mlp(x)).all()


def test_nothing_that_is_saved_changes() -> None:
    model, reference = tiny_llama(0), tiny_llama(0)
    lean(model)
    assert model.state_dict().keys() == reference.state_dict().keys()
    assert repr(model) == repr(reference)
