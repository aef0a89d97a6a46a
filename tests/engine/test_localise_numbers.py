"""The numbers that localisation reads off tensors are right at the edges of the formats."""

from __future__ import annotations

import math

import pytest
import torch

from finitune.engine.localise_modules import OUTSIDE, ROOT, is_part, owner_of
from finitune.engine.op_numbers import constant_of, extremes, half_max, is_bad, numbers_of_bad, peak, watchable

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize(
    ("values", "bad"),
    [([0.0, -0.0], False), ([1e-45, 1.0], False), ([NAN, 1.0], True), ([-INF, 1.0], True), ([1.0, INF], True)],
)
def test_bad_is_what_is_not_finite_in_every_format(dtype: torch.dtype, values: list[float], bad: bool) -> None:
    assert is_bad(torch.tensor(values).to(dtype)) is bad


def test_the_largest_half_numbers_do_not_overflow_while_looking() -> None:
    top = torch.tensor([65504.0, -65504.0], dtype=torch.float16)
    assert not is_bad(top)
    assert peak(top) == half_max(torch.float16) == 65504.0
    assert half_max(torch.float32) is None


def test_the_peak_leaves_out_what_is_not_finite() -> None:
    assert peak(torch.tensor([NAN, -3.0, INF])) == 3.0
    assert peak(torch.tensor([NAN, -INF])) == 0.0


def test_complex_numbers_are_bad_in_either_part() -> None:
    assert is_bad(torch.complex(torch.zeros(2), torch.tensor([0.0, INF])))
    assert not is_bad(torch.complex(torch.zeros(2), torch.ones(2)).conj())


def test_only_dense_floating_tensors_with_elements_are_watched() -> None:
    assert watchable(torch.zeros(1))
    for other in (
        torch.zeros(0),
        torch.zeros(2, dtype=torch.long),
        torch.eye(2).to_sparse(),
        torch.zeros(2, device="meta"),
    ):
        assert not watchable(other)
    assert not watchable("text")


def test_rows_and_columns_of_a_matrix_are_listed_up_to_sixteen() -> None:
    matrix = torch.zeros(40, 3)
    matrix[5:30, 1] = -INF
    data = numbers_of_bad(matrix)
    assert (data["row"], data["num_rows"], len(data["rows"])) == (5, 25, 16)
    assert data["columns"] == [1]
    assert (data["index"], data["value"], data["num_bad"]) == ([5, 1], -INF, 25)
    assert numbers_of_bad(torch.zeros(3))["num_bad"] == 0


def test_a_mask_of_ones_own_says_what_is_bad() -> None:
    moment = torch.tensor([1.0, -2.0])
    assert numbers_of_bad(moment, moment < 0)["index"] == [1]


def test_extremes_keep_nan_and_constants_are_read() -> None:
    assert all(map(math.isnan, extremes(torch.tensor([1.0, NAN]))))
    assert constant_of(torch.tensor([1.0, -INF, NAN])) == -INF


def test_owners_and_places_have_names() -> None:
    assert owner_of("a.b.weight") == "a.b"
    assert owner_of("scale") == ROOT
    assert not is_part(ROOT)
    assert not is_part(OUTSIDE)
    assert is_part("a.b")
