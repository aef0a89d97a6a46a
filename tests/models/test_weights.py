"""The scan of tensors: every dtype, every way of not being finite."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finitune.models.weights import HALF_MAX, scan, shown

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", FLOATS)
def test_healthy_tensors_pass(dtype):
    state = {"w": torch.tensor([0.0, -0.0, 1.0, -448.0]).to(dtype), "empty": torch.zeros(0, dtype=dtype)}
    result = scan(state)
    assert (result.non_finite, result.beyond_half) == ((), ())


def test_integers_and_subnormals_pass():
    state = {
        "ids": torch.tensor([2**40]),
        "flag": torch.tensor([True]),
        "tiny": torch.tensor([5e-324], dtype=torch.float64),
    }
    assert scan(state).non_finite == ()
    assert scan(state).dtypes == {"int64": 1, "bool": 1, "float64": 1}


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(width=32), min_size=1, max_size=40),
)
def test_the_verdict_is_that_of_every_element(values):
    result = scan({"w": torch.tensor(values)})
    assert bool(result.non_finite) == (not all(math.isfinite(v) for v in values))
    if not result.non_finite:
        assert bool(result.beyond_half) == any(abs(v) > HALF_MAX for v in values)


def test_the_first_bad_element_is_named():
    tensor = torch.zeros(3, 4)
    tensor[1, 2], tensor[2, 3] = float("nan"), float("inf")
    assert scan({"w": tensor}).non_finite == ("w[1, 2] = nan",)
    assert scan({"s": torch.tensor(float("inf"))}).non_finite == ("s[] = inf",)


def test_the_largest_half_number_itself_fits():
    assert scan({"w": torch.tensor([65504.0])}).beyond_half == ()
    assert scan({"w": torch.tensor([-65505.0])}).beyond_half == ("w[0] = -65505",)


def test_long_lists_are_cut_and_counted():
    assert shown("abc") == "a, b, c"
    assert shown("abcdefgh") == "a, b, c, d, e, ... (3 more)"
