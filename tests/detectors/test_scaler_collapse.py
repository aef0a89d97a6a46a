"""Scaler collapse: endless overflow, or a scale below 1."""

from __future__ import annotations

import math

import pytest

from finitune.core.robust import History
from finitune.core.types import Finding, Reading
from finitune.detectors.scaler_collapse import Config, detect


def judge(scale: float | None, *, overflows: int = 0, grad_norm: float = 1.0, loss: float = 2.0) -> Finding | None:
    history = History()
    for _ in range(overflows):
        history.overflowed()
    return detect(history, Reading(step=3, loss=loss, grad_norm=grad_norm, loss_scale=scale), Config())


@pytest.mark.parametrize("scale", [0.99, 2.0**-4, 1.4e-17, 0.0, -1.0, math.nan])
def test_a_scale_below_one_has_collapsed(scale: float) -> None:
    found = judge(scale)
    assert found is not None
    assert (found.code, found.veto) == ("NUM020", False)


@pytest.mark.parametrize("scale", [None, 1.0, 2.0, 65536.0, 2.0**24])
def test_no_scaler_and_the_one_of_logs_without_scaling_are_fine(scale: float | None) -> None:
    assert judge(scale) is None


@pytest.mark.parametrize(("scale", "least"), [(2.0, 16), (64.0, 16), (128.0, 40), (65536.0, 40), (2.0**40, 40)])
def test_endless_overflow_is_a_collapse_at_any_scale(scale: float, least: int) -> None:
    assert judge(scale, overflows=least - 2, grad_norm=math.inf) is None
    found = judge(scale, overflows=least - 1, grad_norm=math.inf)
    assert found is not None
    assert found.data["overflows"] == least


def test_from_65536_a_collapse_is_told_after_sixteen_overflows() -> None:
    told = [n for n in range(40) if judge(65536.0 / 2.0**n, overflows=n, grad_norm=math.inf) is not None]
    assert told[0] == 15


@pytest.mark.parametrize("needed", [6, 10, 14])
def test_a_search_from_a_very_large_scale_is_no_collapse(needed: int) -> None:
    """Megatron begins at 2**32: 18 to 26 overflows, and nothing is wrong."""
    for number in range(32 - needed):
        assert judge(2.0 ** (32 - number), overflows=number, grad_norm=math.inf) is None


def test_the_start_up_search_is_no_collapse() -> None:
    """From 65536 down to 64 in ten halvings, then training begins."""
    for number in range(10):
        assert judge(65536.0 / 2**number, overflows=number, grad_norm=math.inf) is None
    assert judge(64.0, overflows=10) is None


def test_a_bad_loss_is_no_overflow_of_the_scale() -> None:
    assert judge(65536.0, overflows=40, grad_norm=math.nan, loss=math.nan) is None
