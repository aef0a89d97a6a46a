"""What is planted for half precision changes nothing in fp32, and what is drawn is what is said."""

from __future__ import annotations

from random import Random

import pytest
import torch

from finitune.bench.faults import _draw, backward_overflow, huge_weight, loud_token
from finitune.bench.faults._measure import FP16_MAX, largest
from finitune.bench.faults.zero_row_norm import RowNorm
from finitune.bench.runs import llama_sft, lora
from finitune.bench.workload import Batch, Workload


@pytest.fixture
def load() -> Workload:
    return llama_sft.build(3, "fp32", 20)


def loss_of(load: Workload, batch: Batch) -> float:
    return float(load.loss(load.model, batch).detach())


def test_every_magnitude_is_as_likely() -> None:
    random = Random(0)
    drawn = [_draw.log_uniform(random, 1e-3, 1e3) for _ in range(2000)]
    assert min(drawn) >= 1e-3
    assert max(drawn) <= 1e3
    assert 900 < sum(value < 1 for value in drawn) < 1100


def test_a_late_token_comes_up_first_where_it_is_said_and_in_no_held_out_row(load: Workload) -> None:
    for seed in range(10):
        token, step = _draw.late_token(load, Random(seed))
        there = [any(token in ids for ids in load.row_ids(s)) for s in range(1, len(load.batches) + 1)]
        assert there.index(True) == step - 1
        assert not any(bool((batch["input_ids"] == token).any()) for batch in load.held_out)
        assert _draw.rows_with(load, token)


def test_a_loud_token_is_loud_inside_and_the_loss_is_as_before(load: Workload) -> None:
    clean = [loss_of(load, batch) for batch in load.batches]
    expected = loud_token.plant(load, Random(1))
    assert [loss_of(load, batch) for batch in load.batches] == clean
    up = f"{expected.data['module']}.up_proj"
    assert largest(load, [up], expected.step)[1][up] > FP16_MAX
    assert all(largest(load, [up], step)[1][up] < FP16_MAX for step in range(1, expected.step))


def test_a_huge_weight_leaves_the_loss_as_it_was_in_fp32() -> None:
    load = lora.build(0, "fp32", 4)
    clean = loss_of(load, load.batches[0])
    expected = huge_weight.plant(load, Random(2))
    assert loss_of(load, load.batches[0]) == pytest.approx(clean, rel=1e-4)
    weight = _draw.base(load, expected.data["modules"][0]).weight
    assert not bool(weight.to(torch.float16).isfinite().all())
    assert bool(weight.to(torch.bfloat16).isfinite().all())


def test_a_loud_backward_has_the_gradients_of_the_plain_one_in_fp32(load: Workload) -> None:
    def gradients() -> list[torch.Tensor]:
        load.optimizer.zero_grad(set_to_none=True)
        load.loss(load.model, load.batches[0]).backward()
        return [p.grad.clone() for p in load.model.parameters() if p.grad is not None]

    clean = gradients()
    expected = backward_overflow.plant(load, Random(3))
    for act in load.after[expected.step - 1]:
        act()
    assert all(torch.equal(a, b) for a, b in zip(clean, gradients(), strict=True))


def test_normalised_rows_are_the_plain_layer_until_one_has_no_length() -> None:
    layer = torch.nn.Linear(8, 4, bias=False)
    x_BD = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    plain_BO = layer(x_BD)
    layer.__class__ = RowNorm
    layer.magnitude_O1 = layer.weight.detach().pow(2).sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(layer(x_BD), plain_BO)
    layer.weight.data[2] = 0.0
    assert layer(x_BD).isnan().any(0).tolist() == [False, False, True, False]
