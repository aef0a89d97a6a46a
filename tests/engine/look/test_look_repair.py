"""Repairs that a model tells itself: computed buffers, rows of a trained vocabulary; nothing for a sound model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finitune.engine.look.repair import of_buffers, of_rows, repairs
from finitune.models.tiny import tiny_internlm2, tiny_llama

SIZES = {"hidden": 32, "layers": 1, "heads": 2, "kv_heads": 2, "mlp": 32}
FREQUENCIES = "model.rotary_emb.inv_freq"


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("build", [tiny_llama, tiny_internlm2])
@pytest.mark.parametrize("tied", [0, 1])
def test_a_sound_model_asks_for_no_repair(build: Any, tied: int) -> None:
    assert repairs(build(0, **SIZES, tied=tied)) == []


@pytest.mark.parametrize("build", [tiny_llama, tiny_internlm2])
@pytest.mark.parametrize("factor", [0.0, 37.0, 1e-3])
def test_a_computed_buffer_gets_the_bits_that_the_configuration_gives(build: Any, factor: float) -> None:
    model = build(0, **SIZES)
    sound = bits(model)
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.mul_(factor)
    spoilt, found = bits(model), of_buffers(model)
    assert found is not None
    assert found.finding.code == "MOD112"
    with found.in_place():
        assert same(bits(model), sound)
    assert same(bits(model), spoilt)
    found.put()
    assert same(bits(model), sound)


def test_a_buffer_of_another_shape_is_no_matter_of_values() -> None:
    model = tiny_llama(0, **SIZES)
    model.model.rotary_emb.inv_freq = torch.ones(3)
    assert of_buffers(model) is None


def test_rows_take_the_mean_of_all_others_and_other_rows_stay() -> None:
    model = tiny_llama(0, **SIZES)
    head = model.lm_head.weight.data
    head[[60, 62]] *= 500.0
    head[61] *= 12.0  # with them: beyond the usual, though not out of all proportion by itself
    before, found = head.clone(), of_rows(model)
    assert found is not None
    assert (found.names, sorted(found.rows[0])) == (("lm_head.weight",), [60, 61, 62])
    with found.in_place():
        others = [i for i in range(len(head)) if i not in (60, 61, 62)]
        assert torch.allclose(head[60], before[others].mean(0))
        assert torch.equal(head[60], head[62])
        assert torch.equal(head[others], before[others])
    assert torch.equal(head, before)


def test_rows_that_are_only_long_and_frozen_tables_are_left_alone() -> None:
    model = tiny_llama(0, **SIZES)
    model.lm_head.weight.data[61] *= 12.0
    assert of_rows(model) is None
    model.lm_head.weight.data[61] *= 12.0
    assert of_rows(model) is not None
    model.lm_head.weight.requires_grad_(False)
    assert of_rows(model) is None


def test_rows_that_are_not_finite_have_no_part_in_the_mean() -> None:
    model = tiny_llama(0, **SIZES)
    model.lm_head.weight.data[60] *= 500.0
    model.lm_head.weight.data[3, 0] = torch.nan
    found = of_rows(model)
    assert found is not None
    assert bool(torch.isfinite(found.good[0][60]).all())
    assert bool(found.good[0][3, 0].isnan())


def test_half_weights_keep_their_format() -> None:
    model = tiny_llama(0, **SIZES).to(torch.bfloat16)
    model.lm_head.weight.data[60] *= 500.0
    found = of_rows(model)
    assert found is not None
    assert found.good[0].dtype is torch.bfloat16


def test_rows_of_a_run_that_has_made_updates_are_what_they_have_become() -> None:
    model = tiny_llama(0, **SIZES)
    model.lm_head.weight.data[60] *= 500.0
    model.get_buffer(FREQUENCIES).zero_()
    assert [r.experiment for r in repairs(model)] == ["computed_buffers", "mean_rows"]
    assert [r.experiment for r in repairs(model, is_trained=True)] == ["computed_buffers"]
