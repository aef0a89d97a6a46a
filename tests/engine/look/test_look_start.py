"""The look before the first step: each fault is named where it is, and healthy models give nothing to say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from finitune.core.codes import all_codes, fill
from finitune.core.types import Finding
from finitune.engine.look.start import at_start
from finitune.models.tiny import tiny_internlm2, tiny_llama

SIZES = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 2, "mlp": 64}
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def model() -> Any:
    return tiny_llama(0, **SIZES)


def weight(model: nn.Module, name: str) -> torch.Tensor:
    return dict(model.named_parameters())[name].data


def adam(model: nn.Module, lr: float = 1e-3, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr, **options)


def only(findings: tuple[Finding, ...], code: str, where: str, fault_class: str) -> Finding:
    assert [(f.code, f.where, f.data["fault_class"]) for f in findings] == [(code, where, fault_class)]
    told = fill(all_codes()[code].en.what, findings[0].data)
    assert "{" not in told, told
    return findings[0]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("build", [tiny_llama, tiny_internlm2])
@pytest.mark.parametrize("sizes", [{}, {"tied": 1}, {"hidden": 8, "heads": 2, "kv_heads": 1, "layers": 1}])
def test_a_healthy_model_gives_nothing_to_say(build: Any, seed: int, sizes: dict[str, int]) -> None:
    made = build(seed, **sizes)
    assert at_start(made, adam(made)) == ()


# -- not finite ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_element_is_named_with_its_index_also_in_a_frozen_weight(model: Any, value: float) -> None:
    model.requires_grad_(False)
    weight(model, DOWN)[3, 5] = value
    found = only(at_start(model), "MOD110", DOWN, "H")
    assert (found.data["index"], found.data["bad"], found.data["count"]) == ("3, 5", 1, 1)


def test_the_row_of_the_padding_token_is_told(model: Any) -> None:
    weight(model, "model.embed_tokens.weight")[0] = math.nan
    assert only(at_start(model), "MOD110", "model.embed_tokens.weight", "H").data["told"] == "(pad_token_id = 0)"


def test_a_tensor_that_is_nan_all_over_was_never_filled(model: Any) -> None:
    weight(model, "lm_head.weight").fill_(math.nan)
    assert "torch.empty" in only(at_start(model), "MOD110", "lm_head.weight", "H").data["told"]


def test_a_weight_beyond_fp16_is_a_matter_of_the_cast(model: Any) -> None:
    weight(model, DOWN)[0, 0] = 70000.0
    only(at_start(model.half()), "MOD110", DOWN, "B")


def test_large_finite_weights_whose_squares_leave_fp32_are_finite(model: Any) -> None:
    weight(model, "model.norm.weight").fill_(3e19)
    assert [f for f in at_start(model) if f.code == "MOD110"] == []


def test_an_infinite_buffer_is_a_mask_and_a_nan_is_not(model: Any) -> None:
    model.register_buffer("causal", torch.full((4, 4), -math.inf).triu(1))
    assert at_start(model) == ()
    model.causal[1, 1] = math.nan
    only(at_start(model), "MOD110", "causal", "H")


# -- never filled, rows, buffers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2**27, 2**31 - 1])
def test_memory_that_was_never_written_is_no_weight(model: Any, bits: int) -> None:
    head = weight(model, "lm_head.weight")
    head.view(torch.int32).random_(0, bits, generator=torch.Generator().manual_seed(0))
    head.nan_to_num_(0.0, 1e30, -1e30)
    assert "MOD115" in {f.code for f in at_start(model)}


def test_one_large_element_is_not_a_tensor_without_values(model: Any) -> None:
    weight(model, DOWN)[0, 0] = 70000.0
    assert at_start(model) == ()


@pytest.mark.parametrize("factor", [50.0, 1000.0])
def test_new_rows_out_of_scale_are_named_by_token(model: Any, factor: float) -> None:
    weight(model, "model.embed_tokens.weight")[64:68] *= factor
    found = only(at_start(model), "MOD113", "model.embed_tokens.weight", "O")
    assert (found.data["tokens"], found.data["count"]) == ("64, 65, 66, 67", 4)


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan])
def test_a_lost_rotary_buffer_is_told_with_what_it_should_be(model: Any, value: float) -> None:
    model.model.rotary_emb.inv_freq[1] = value
    found = {f.code: f for f in at_start(model)}["MOD112"]
    assert found.where == "model.rotary_emb.inv_freq"
    assert (found.data["index"], found.data["bad"]) == ("1", 1)
    assert found.data["expected"] == pytest.approx(10000.0 ** (-2 / 16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_rotary_buffer_in_half_precision_is_the_same_up_to_rounding(model: Any, dtype: torch.dtype) -> None:
    assert at_start(model.to(dtype)) == ()


# -- formats ---------------------------------------------------------------------------------------------------------


def test_an_eps_that_is_zero_in_fp16_is_told_before_it_divides(model: Any) -> None:
    model.half()
    only(at_start(model, adam(model, 0.1)), "OPT110", "model.embed_tokens.weight", "D")
    assert at_start(model, adam(model, 0.1, eps=1e-4)) == ()
    assert at_start(model, adam(model, 0.1, fused=True)) == ()
    assert at_start(model, torch.optim.SGD(model.parameters(), 0.1)) == ()


@pytest.mark.parametrize("rate", [1e-5, 1e-6])
def test_updates_that_bf16_rounds_away_are_counted_as_an_update_would(model: Any, rate: float) -> None:
    model.bfloat16()
    found = only(at_start(model, adam(model, rate)), "OPT111", "", "J")
    before = [p.detach().clone() for p in model.parameters()]
    moved = sum(int(((p + rate) != p).sum() + ((p - rate) != p).sum()) / 2 for p in before)
    share = moved / sum(p.numel() for p in before)
    assert found.data["percent"] / 100 == pytest.approx(share, abs=0.02)
    assert share < 0.5


def test_updates_that_are_large_enough_or_kept_in_fp32_are_fine(model: Any) -> None:
    assert at_start(model, adam(model, 1e-7)) == ()
    model.bfloat16()
    assert at_start(model, adam(model, 1e-3)) == ()
