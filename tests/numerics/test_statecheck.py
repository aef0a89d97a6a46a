"""The state check finds every value that is not finite, in every form a tensor can have, and nothing else."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finitune.numerics import statecheck
from finitune.numerics.statecheck import bad_tensors

POISONS = [math.nan, -math.nan, math.inf, -math.inf]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2]


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 1, 15, 16, 63, 64, 32767, 32768, 50_000, 70_002])
def test_one_bad_element_is_found_wherever_it_is(dtype: torch.dtype, poison: float, place: int) -> None:
    spoilt = torch.zeros(70_003, dtype=torch.float32)
    spoilt[place] = poison
    named = [("good", torch.ones(5, dtype=dtype)), ("bad", spoilt.to(dtype)), ("other", torch.ones(2))]
    assert bad_tensors(named) == ["bad"]


@given(st.integers(0, 2**32 - 1), st.integers(1, 200), st.data())
@settings(max_examples=200, deadline=None)
def test_every_bit_pattern_is_judged_as_isfinite_judges_it(bits: int, size: int, data: st.DataObject) -> None:
    (value,) = struct.unpack("<f", struct.pack("<I", bits))
    tensor = torch.randn(size)
    tensor.view(torch.int32)[data.draw(st.integers(0, size - 1))] = bits - (1 << 32 if bits >= 1 << 31 else 0)
    assert (bad_tensors([("t", tensor)]) == ["t"]) is not math.isfinite(value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_patterns_of_half_precision(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = torch.isfinite(every)
    assert bad_tensors([("t", every[finite])]) == []
    found = bad_tensors((str(i), value.reshape(1)) for i, value in enumerate(every))
    assert found == [str(int(i)) for i in (~finite).nonzero()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_finite_values_are_fine_though_their_sum_overflows(dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    assert bad_tensors([("up", torch.full((5000,), top, dtype=torch.float64).to(dtype))]) == []
    down = torch.full((5000,), -top, dtype=torch.float64).to(dtype)
    assert bad_tensors([("down", down), ("beyond fp32", torch.tensor([1e300], dtype=torch.float64))]) == []


def test_zero_minus_zero_and_subnormals_are_fine() -> None:
    assert bad_tensors([("t", torch.tensor([0.0, -0.0, 1e-45, -1e-40]))]) == []


def test_opposite_infinities_do_not_cancel_out() -> None:
    assert bad_tensors([("t", torch.tensor([math.inf, -math.inf, 1.0]))]) == ["t"]


def test_tensors_without_numbers_are_fine() -> None:
    named = [
        ("empty", torch.zeros(0)),
        ("empty too", torch.zeros(3, 0, dtype=torch.bfloat16)),
        ("meta", torch.empty(4, device="meta")),
        ("integers", torch.arange(4)),
        ("truths", torch.tensor([True])),
    ]
    assert bad_tensors(named) == []
    assert bad_tensors([]) == []
    assert bad_tensors([*named, ("bad", torch.tensor(math.nan))]) == ["bad"]


def test_a_view_is_judged_by_what_it_shows() -> None:
    whole = torch.zeros(64, 64)
    whole[1, 1] = math.nan
    assert bad_tensors([("seen", whole.t()[:, 1]), ("not seen", whole[::2, ::2]), ("row", whole[1])]) == ["seen", "row"]
    assert bad_tensors([("expanded", torch.tensor([math.inf]).expand(1000, 1000))]) == ["expanded"]


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("poison", [*POISONS, 1.0])
def test_what_a_sparse_tensor_stores_is_looked_at(poison: float) -> None:
    dense = torch.zeros(4, 4)
    dense[2, 1] = poison
    forms = {"coo": dense.to_sparse(), "csr": dense.to_sparse_csr(), "none": torch.zeros(3, 3).to_sparse()}
    assert bad_tensors(forms.items()) == ([] if poison == 1.0 else ["coo", "csr"])


def test_complex_numbers_are_bad_in_either_part() -> None:
    parts = {"real": complex(math.nan, 0), "imaginary": complex(0, math.inf), "none": complex(1, 1)}
    tensors = {name: torch.tensor([1 + 1j, value]) for name, value in parts.items()}
    assert bad_tensors(tensors.items()) == ["real", "imaginary"]
    assert bad_tensors([("conjugate", tensors["imaginary"].conj())]) == ["conjugate"]


def test_a_tied_tensor_is_read_once_and_told_by_all_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    real = torch.aminmax
    monkeypatch.setattr(torch, "aminmax", lambda t: reads.append(t) or real(t))
    tied = torch.nn.Parameter(torch.tensor([1.0, math.nan]))
    assert bad_tensors([("embedding", tied), ("other", torch.ones(2)), ("head", tied)]) == ["embedding", "head"]
    assert len(reads) == 2


def test_parameters_and_inference_tensors_are_looked_at_without_a_graph() -> None:
    with torch.inference_mode():
        frozen = torch.tensor([math.inf])
    weight = torch.nn.Parameter(torch.tensor([math.nan]))
    assert bad_tensors([("weight", weight), ("frozen", frozen)]) == ["weight", "frozen"]
    assert weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e5m2])
def test_the_look_of_other_devices_is_exact_as_well(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """There a norm is asked first; where it is not finite, the tensors themselves."""
    both = statecheck._unbounded
    monkeypatch.setattr(
        statecheck, "_unbounded", lambda group, largest: both(statecheck._suspicious(group, largest), largest)
    )
    bad = torch.tensor([1.0, math.nan]).to(dtype)
    large = torch.full((9,), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
    named = [("large", large), ("bad", bad), ("small", bad[:1])]
    assert bad_tensors(named) == ["bad"]
    assert bad_tensors(named[::2]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [1e20, -1e20, 3e38, -3e38])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_an_absurd_value_is_found_where_it_is_asked_for(
    dtype: torch.dtype, value: float, on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not on_cpu:
        both = statecheck._unbounded
        monkeypatch.setattr(
            statecheck, "_unbounded", lambda group, largest: both(statecheck._suspicious(group, largest), largest)
        )
    spoilt = torch.zeros(1000, dtype=dtype)
    spoilt[17] = value
    named = [("good", torch.full((1000,), 2.0**32, dtype=dtype)), ("bad", spoilt)]
    assert bad_tensors(named, statecheck.ABSURD) == ["bad"]
    assert bad_tensors(named) == []


def test_half_precision_holds_nothing_absurd() -> None:
    assert bad_tensors([("t", torch.full((9,), 65504.0, dtype=torch.float16))], statecheck.ABSURD) == []
    assert bad_tensors([("t", torch.full((9,), math.inf, dtype=torch.float16))], statecheck.ABSURD) == ["t"]
