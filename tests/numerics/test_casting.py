"""Half weights go to another dtype and come back bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from finitune.numerics.casting import CastWeights, cast_weights, weights_in


class Mixed(nn.Module):
    """Half weights with every kind of bit pattern, a half buffer, an fp32 norm, a tied weight."""

    def __init__(self, dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(4, 4).to(dtype)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.one.weight
        self.norm = nn.LayerNorm(4)
        self.register_buffer("table", torch.randn(4).to(dtype))
        self.register_buffer("count", torch.tensor(3))
        with torch.no_grad():
            raw = self.one.weight.view(torch.int16)
            # -0, a subnormal, inf, a quiet and a signalling NaN with payload
            raw[0] = torch.tensor([-0x8000, 1, 0x7C00 if dtype == torch.float16 else 0x7F80, 0x7E01], dtype=torch.int16)
            raw[1, 0] = 0x7C03 if dtype == torch.float16 else 0x7F83


def bits(model: nn.Module) -> list[tuple[int, Tensor]]:
    named = [*model.parameters(), *model.buffers()]
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [(t.data_ptr(), t.detach().view(whole[t.element_size()]).clone()) for t in named]


def same(a: list[tuple[int, Tensor]], b: list[tuple[int, Tensor]]) -> bool:
    return all(p == q and torch.equal(x, y) for (p, x), (q, y) in zip(a, b, strict=True))


def train(model: Mixed, optimizer: torch.optim.Optimizer) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_in_the_dtype_inside_and_have_their_storage_back(dtype: torch.dtype) -> None:
    model = Mixed()
    before = bits(model)
    parameters = list(model.parameters())
    with pytest.raises(ZeroDivisionError), weights_in(model, dtype):  # noqa: PT012
        assert model.one.weight.dtype == model.table.dtype == dtype
        assert model.tied.weight is model.one.weight
        assert model.norm.weight.dtype == torch.float32
        model.one(torch.ones(1, 4, dtype=dtype)).sum().backward()
        with torch.no_grad():
            model.one.weight.fill_(5.0)
        raise ZeroDivisionError
    assert same(before, bits(model))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert model.one.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_without_an_update_is_the_identity(dtype: torch.dtype) -> None:
    model = Mixed()
    optimizer = torch.optim.AdamW(model.parameters(), eps=1e-4)
    train(model, optimizer)
    moment = optimizer.state[model.one.weight]["exp_avg"]
    before, moments = bits(model), (moment.data_ptr(), moment.clone())
    cast = cast_weights(model, optimizer, dtype)
    assert model.one.weight.dtype == moment.dtype == dtype
    assert optimizer.state[model.one.weight]["exp_avg"] is moment
    cast.to(None)
    assert same(before, bits(model))
    assert (moment.data_ptr(), moment.dtype) == (moments[0], torch.float16)
    assert torch.equal(moment, moments[1])


def test_a_trial_of_the_old_dtype_loses_no_bit_of_the_new_one() -> None:
    """Giving back a precision is tried on a batch; refused, the fp32 weights must be what they were."""
    model = Mixed()
    optimizer = torch.optim.AdamW(model.parameters(), eps=1e-4)
    cast = cast_weights(model, optimizer, torch.float32)
    train(model, optimizer)
    with torch.no_grad():
        model.one.weight[2, 0] = 70000.0  # does not exist in fp16
    before = bits(model)
    cast.to(None)
    assert model.one.weight.dtype == torch.float16
    assert optimizer.state[model.one.weight]["exp_avg"].dtype == torch.float16
    assert model.one.weight[2, 0].isinf()
    cast.to(torch.float32)
    assert same(before, bits(model))


def test_after_an_update_values_are_converted_into_the_storage_of_home() -> None:
    model = Mixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    home = model.one.weight.data_ptr()
    cast = CastWeights(model, optimizer)
    cast.to(torch.float32)
    cast.to(torch.bfloat16)
    cast.to(torch.float32)
    train(model, optimizer)
    trained = model.one.weight.detach().clone()
    cast.to(None)
    assert model.one.weight.data_ptr() == home
    assert torch.equal(model.one.weight[2:], trained[2:].half())


def test_fp32_moments_of_half_weights_stay_fp32() -> None:
    model = nn.Linear(2, 2).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.state[model.weight]["momentum_buffer"] = torch.ones(2, 2)
    cast = CastWeights(model, optimizer)
    for dtype in (torch.float32, None, torch.bfloat16, None):
        cast.to(dtype)
        assert optimizer.state[model.weight]["momentum_buffer"].dtype == torch.float32


def test_a_model_without_half_weights_is_left_alone() -> None:
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    before = bits(model)
    cast_weights(model, None, torch.bfloat16)
    assert same(before, bits(model))
    assert model.weight.grad is not None


def test_training_goes_on_in_the_new_dtype() -> None:
    model = nn.Linear(4, 1).half()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.ones(2, 4).half()).sum().backward()
    cast_weights(model, optimizer, torch.float32)
    assert model.weight.grad is None
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.weight.isfinite().all()
    assert optimizer.state[model.weight]["exp_avg"].dtype == torch.float32
