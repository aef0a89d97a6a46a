"""Nothing to train: a step without supervised tokens leaves the weights alone."""

from __future__ import annotations

import math

import pytest

from finitune.core.robust import History
from finitune.core.types import Reading, Severity
from finitune.detectors.nothing_to_train import Config, detect


@pytest.mark.parametrize("loss", [math.nan, 0.0])
def test_no_supervised_token_is_a_veto_and_a_warning(loss: float) -> None:
    found = detect(History(), Reading(step=4, loss=loss, grad_norm=0.0, supervised_tokens=0, tokens=512), Config())
    assert found is not None
    assert (found.code, found.veto, found.severity) == ("DAT100", True, Severity.WARNING)
    assert found.data["tokens"] == 512


@pytest.mark.parametrize("supervised", [None, 1, 500])
def test_one_token_or_no_measurement_is_fine(supervised: int | None) -> None:
    assert detect(History(), Reading(step=4, loss=2.0, grad_norm=1.0, supervised_tokens=supervised), Config()) is None
