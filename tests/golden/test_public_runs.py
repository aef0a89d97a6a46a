"""Numbers that public large runs have published, in front of today's detectors.

Only the few steps around an event were ever printed; what came before is calm noise at the published level.
"""

from __future__ import annotations

import math
import random

import pytest

from finitune.core.robust import History
from finitune.core.types import Reading, Verdict
from finitune.engine.judge import Judge

# (iteration, lm loss, grad norm): the first loss spike of the 176B run of BigScience, 2022-04-12, rate 5.279e-5.
# Source: bigscience-workshop/bigscience, train/tr11-176B-ml/chronicles.md. It recovered by itself 30 iterations later.
BLOOM_176B = (
    (31214, 2.198845, 0.242),
    (31215, 2.220424, 0.947),
    (31216, 2.595213, 2.390),
    (31217, 2.241558, 15.886),
    (31218, 2.345279, 145.119),
    (31219, 5.098124, 960.351),
    (31220, 3.492029, 353.201),
    (31221, 3.213059, 379.330),
    (31222, 2.804948, 650.246),
)
BLOOM_LR = 5.279e-5
# A quiet iteration of the same run (12695): loss 2.4636, norm 0.174; and two after the spike: 0.267, 0.205.
CALM_LOSS, CALM_NORM = 2.21, 0.21


def before(seed: int, first: int, count: int = 400) -> list[Reading]:
    """Calm iterations at the published level."""
    numbers = random.Random(seed)
    return [
        Reading(
            step=first - count + i,
            loss=CALM_LOSS * math.exp(0.015 * numbers.gauss(0, 1)),
            grad_norm=CALM_NORM * math.exp(0.15 * numbers.gauss(0, 1)),
            lr=BLOOM_LR,
        )
        for i in range(count)
    ]


def said(readings: list[Reading]) -> dict[int, tuple[Verdict, list[str]]]:
    """What the judge says of each step; refused steps enter no statistic."""
    judge, history, told = Judge.of({}), History(), {}
    for reading in readings:
        judgement = judge.judge(history, reading)
        if judgement.findings:
            told[reading.step] = (judgement.verdict, [f.code for f in judgement.findings])
        if judgement.verdict is Verdict.COMMIT:
            history.commit(reading)
        else:
            history.aborted()
    return told


@pytest.mark.parametrize("seed", range(10))
def test_the_first_spike_of_the_176b_run_is_told_before_the_loss_jumps(seed: int) -> None:
    event = [Reading(step=s, loss=loss, grad_norm=norm, lr=BLOOM_LR) for s, loss, norm in BLOOM_176B]
    told = said([*before(seed, event[0].step), *event])
    assert min(told) >= 31215, told
    assert min(told) <= 31217, told
    # The norms of 15.9, 145 and 960 are none of a calm run: these steps are refused, so 960 never comes about.
    refused = [step for step, (verdict, _) in told.items() if verdict is Verdict.ABORT]
    assert refused, told
    assert refused[0] <= 31218, told


@pytest.mark.parametrize("seed", range(10))
def test_the_calm_before_it_is_silent(seed: int) -> None:
    assert said(before(seed, 31214, 2000)) == {}
