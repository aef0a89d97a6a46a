"""Replaced loss: zeros in the place of a loss are told from a loss that was learnt away."""

from __future__ import annotations

import math

import pytest

from finitune.core.robust import History
from finitune.core.types import Reading, Severity
from finitune.detectors.replaced_loss import Config, detect


def after(*losses: float) -> History:
    history = History()
    for step, loss in enumerate(losses, 1):
        history.commit(Reading(step=step, loss=loss, grad_norm=1.0))
    return history


ZERO = Reading(step=9, loss=0.0, grad_norm=0.0, supervised_tokens=40)


def test_a_zero_among_losses_is_a_warning_that_names_the_median() -> None:
    found = detect(after(2.4, 2.3, 2.2, 2.1, 2.0), ZERO, Config())
    assert found is not None
    assert (found.code, found.veto, found.severity) == ("NUM130", False, Severity.WARNING)
    assert found.data["median"] == pytest.approx(2.2)


@pytest.mark.parametrize("losses", [(), (2.0,), (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)])
def test_a_loss_that_was_learnt_away_or_has_no_past_is_fine(losses: tuple[float, ...]) -> None:
    assert detect(after(*losses), ZERO, Config()) is None


@pytest.mark.parametrize(
    "reading",
    [
        Reading(step=9, loss=0.0, grad_norm=0.3, supervised_tokens=40),  # the policy loss of a group sums to 0
        Reading(step=9, loss=0.0, grad_norm=0.0, supervised_tokens=0),  # nothing to train is another code
        Reading(step=9, loss=1e-30, grad_norm=0.0, supervised_tokens=40),
        Reading(step=9, loss=math.nan, grad_norm=math.nan, supervised_tokens=40),
    ],
)
def test_everything_else_is_not_called_replaced(reading: Reading) -> None:
    assert detect(after(2.4, 2.3, 2.2, 2.1, 2.0), reading, Config()) is None
