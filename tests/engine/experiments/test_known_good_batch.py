"""Batches that went well before, on the weights of the failing step: whether it is the batch or the state."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.experiments.test_single import made, trained
from finitune.core.incident import Result, Trigger
from finitune.engine.experiments import known_good_batch
from finitune.engine.lab import Lab
from finitune.engine.snapshot import as_snapshot


def outlier(limit: float = 50.0) -> Lab:
    """A step that a detector calls an outlier above ``limit``."""
    return trained(10, Trigger.OUTLIER, limit=limit)


def spoilt(lab: Lab, factor: float) -> Lab:
    """The present weights of the head are ``factor`` times as large: every loss rises, none beyond the limit."""
    with torch.no_grad():
        dict(lab.port.parameters())["lm_head.weight"].mul_(factor)
    lab.before = as_snapshot(lab.port)
    return lab


def test_an_outlier_on_sound_weights_leaves_other_batches_good() -> None:
    found, suspects = made(outlier(), "known_good_batch")
    assert (found.result, found.numbers["num_good"], suspects) == (Result.GOOD, 2, ())
    assert "{" not in known_good_batch.SAYS[Result.GOOD].say(found.numbers)


def test_batches_that_were_learnt_from_and_are_far_worse_now_are_not_well_though_below_the_limit() -> None:
    """The limit of an outlier follows the course, so it is too wide for what went well a moment ago."""
    lab = spoilt(outlier(), 60.0)
    found, _ = made(lab, "known_good_batch")
    assert all(loss < 50.0 for loss in found.numbers["losses"])
    assert (found.result, found.numbers["num_good"]) == (Result.BAD, 0)
    assert "{" not in known_good_batch.SAYS[Result.BAD].say(found.numbers)


def test_the_limit_counts_as_well() -> None:
    assert made(outlier(limit=0.1), "known_good_batch")[0].result is Result.BAD


@pytest.mark.parametrize("trigger", [Trigger.LOSS, Trigger.GRADIENT])
def test_a_finite_loss_is_good_where_the_failure_is_one_of_numbers(trigger: Trigger) -> None:
    """However high: only what is not finite is this failure."""
    lab = spoilt(trained(10, trigger), 60.0)
    assert made(lab, "known_good_batch")[0].result is Result.GOOD


def test_without_a_record_of_their_losses_the_limit_alone_counts() -> None:
    lab = spoilt(outlier(), 60.0)
    lab.case = replace(lab.case, past={**lab.case.past, "recent_losses": []})
    assert made(lab, "known_good_batch")[0].result is Result.GOOD
