"""What follows a verdict is a pure function: commit, retry at a smaller scale, skip, halt."""

from __future__ import annotations

import math

import pytest

from finitune.core.robust import History
from finitune.core.types import Finding, Judgement, Reading, Severity, Verdict
from finitune.engine.policy import Action, Policy, decide

COMMIT = Judgement(Verdict.COMMIT)
ABORT = Judgement(Verdict.ABORT, (Finding("NUM001", Severity.ERROR, veto=True),))


def reading(loss: float = 1.0, norm: float = 1.0, scale: float | None = None) -> Reading:
    return Reading(step=1, loss=loss, grad_norm=norm, loss_scale=scale)


def test_a_commit_goes_on() -> None:
    assert decide(COMMIT, reading(), History(), Policy(), scale_left=True) is Action.PROCEED


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_an_overflow_under_a_scaler_is_tried_again_while_a_scale_is_left(norm: float) -> None:
    overflow = reading(norm=norm, scale=1024.0)
    assert decide(ABORT, overflow, History(), Policy(), scale_left=True) is Action.RETRY_SMALLER_SCALE
    assert decide(ABORT, overflow, History(), Policy(), scale_left=False) is Action.SKIP_BATCH


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_no_matter_of_scale(loss: float) -> None:
    bad = reading(loss=loss, norm=math.nan, scale=1024.0)
    assert decide(ABORT, bad, History(), Policy(), scale_left=True) is Action.SKIP_BATCH


def test_without_a_scaler_the_batch_is_given_up() -> None:
    assert decide(ABORT, reading(norm=math.nan), History(), Policy(), scale_left=False) is Action.SKIP_BATCH


def test_the_eighth_abort_in_a_row_halts_and_a_commit_starts_the_count_anew() -> None:
    history, policy = History(), Policy(max_aborts_in_a_row=8)
    for _ in range(7):
        assert decide(ABORT, reading(norm=math.nan), history, policy, scale_left=False) is Action.SKIP_BATCH
        history.aborted()
    assert decide(ABORT, reading(norm=math.nan), history, policy, scale_left=False) is Action.HALT
    history.committed(1.0, 1.0)
    assert decide(ABORT, reading(norm=math.nan), history, policy, scale_left=False) is Action.SKIP_BATCH
