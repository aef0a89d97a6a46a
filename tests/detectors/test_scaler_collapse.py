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


def test_endless_overflow_is_a_collapse_at_any_scale() -> None:
    assert judge(65536.0, overflows=14, grad_norm=math.inf) is None
    found = judge(65536.0, overflows=15, grad_norm=math.inf)
    assert found is not None
    assert found.data["overflows"] == 16


def test_the_start_up_search_is_no_collapse() -> None:
    """From 65536 down to 64 in ten halvings, then training begins."""
    for number in range(10):
        assert judge(65536.0 / 2**number, overflows=number, grad_norm=math.inf) is None
    assert judge(64.0, overflows=10) is None


def test_a_bad_loss_is_no_overflow_of_the_scale() -> None:
    assert judge(65536.0, overflows=40, grad_norm=math.nan, loss=math.nan) is None
