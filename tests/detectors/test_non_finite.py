"""Non-finite losses and gradients: always a veto, with the right code."""

from __future__ import annotations

import math

import pytest

from finitune.core.robust import History
from finitune.core.types import Finding, Reading, Severity
from finitune.detectors.non_finite import Config, detect

BAD = (math.nan, math.inf, -math.inf)


def judge(**fields: object) -> Finding | None:
    reading = Reading(**{"step": 7, "loss": 2.0, "grad_norm": 1.0, **fields})  # type: ignore[arg-type]
    return detect(History(), reading, Config())


@pytest.mark.parametrize("loss", BAD)
@pytest.mark.parametrize("grad_norm", [*BAD, 0.0, 1.0])
@pytest.mark.parametrize("loss_scale", [None, 65536.0])
def test_a_bad_loss_is_num001_whatever_the_gradient_and_scale(
    loss: float, grad_norm: float, loss_scale: float | None
) -> None:
    """A smaller scale cannot heal a forward pass that never saw the scale."""
    found = judge(loss=loss, grad_norm=grad_norm, loss_scale=loss_scale)
    assert found is not None
    assert (found.code, found.veto, found.severity) == ("NUM001", True, Severity.ERROR)


@pytest.mark.parametrize("grad_norm", BAD)
def test_a_bad_gradient_with_a_finite_loss_is_num002_and_names_parameters(grad_norm: float) -> None:
    found = judge(grad_norm=grad_norm, bad_parameters=("layers.0.q", "layers.0.k"), num_bad_parameters=12)
    assert found is not None
    assert (found.code, found.veto, found.severity) == ("NUM002", True, Severity.ERROR)
    assert found.where == "layers.0.q"
    assert found.data["num_bad"] == 12
    assert found.data["first"] == "layers.0.q, layers.0.k"


@pytest.mark.parametrize("grad_norm", BAD)
@pytest.mark.parametrize("loss", [2.0, 0.0, -3.0])
def test_a_bad_gradient_under_a_loss_scale_is_a_note_but_a_veto(loss: float, grad_norm: float) -> None:
    found = judge(loss=loss, grad_norm=grad_norm, loss_scale=65536.0)
    assert found is not None
    assert (found.code, found.veto, found.severity) == ("NUM003", True, Severity.NOTE)
    assert found.data["loss_scale"] == 65536.0


@pytest.mark.parametrize("value", [0.0, -0.0, -5.0, 5e-324, 1.7976931348623157e308])
def test_finite_is_finite_however_odd(value: float) -> None:
    assert judge(loss=value, grad_norm=abs(value)) is None


def test_it_never_gives_in() -> None:
    """Unlike the spike detectors: after a thousand refusals the next bad step is refused too."""
    history = History()
    for _ in range(1000):
        history.aborted()
    found = detect(history, Reading(step=1, loss=math.nan, grad_norm=1.0), Config())
    assert found is not None
    assert found.veto
