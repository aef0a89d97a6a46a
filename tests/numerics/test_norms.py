"""Norms see every bad value, whatever the dtype, and name where it is."""

from __future__ import annotations

import math

import pytest
import torch

from finitune.numerics.norms import bad_names, first_bad, tensor_norms, total_norm

POISONS = [math.nan, math.inf, -math.inf]


def test_norms_are_the_l2_norms_and_join_to_the_total() -> None:
    tensors = [torch.tensor([3.0, 4.0]), torch.full((2, 2), -6.0)]
    norms = tensor_norms(tensors)
    assert norms.tolist() == [5.0, 12.0]
    assert float(total_norm(norms)) == 13.0


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_bad_element_is_never_lost(dtype: torch.dtype, poison: float) -> None:
    tensors = [torch.ones(7, dtype=dtype), torch.zeros(1000, dtype=dtype)]
    tensors[1][500] = poison
    norms = tensor_norms(tensors)
    assert not math.isfinite(total_norm(norms))
    assert bad_names(["a", "b"], norms) == ["b"]


def test_half_tensors_are_summed_in_fp32() -> None:
    """300 elements of 300 have squares beyond fp16."""
    assert float(tensor_norms([torch.full((300,), 300.0, dtype=torch.float16)])[0]) == pytest.approx(300 * 300**0.5)


def test_zero_minus_zero_and_subnormals_are_finite() -> None:
    norms = tensor_norms([torch.tensor([0.0, -0.0]), torch.tensor([1e-45, 1e-40]), torch.zeros(0)])
    assert bool(torch.isfinite(norms).all())


def test_nothing_has_no_norm() -> None:
    assert float(total_norm(tensor_norms([]))) == 0.0


@pytest.mark.parametrize("poison", POISONS)
def test_the_first_bad_element_is_found(poison: float) -> None:
    tensor = torch.zeros(3, 4)
    tensor[1, 2] = poison
    tensor[2, 0] = math.nan
    index, value = first_bad(tensor)
    assert index == 6
    assert value == poison or math.isnan(poison)
    assert first_bad(torch.zeros(3)) is None
