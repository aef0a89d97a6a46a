"""Runaway: a learning rate far too high is told within steps; hard data, spikes and starts are not."""

from __future__ import annotations

import math
import random
from types import ModuleType

import pytest

from finitune.core.robust import History
from finitune.core.types import Finding, Reading, Severity
from finitune.detectors import divergence
from finitune.detectors.runaway import Config, detect


def said_of(
    traces: ModuleType,
    losses: list[float],
    *,
    norms: list[float] | None = None,
    rates: list[float] | None = None,
    ratios: list[float | None] | None = None,
    config: Config | None = None,
) -> list[tuple[int, Finding]]:
    settings = config or Config()
    readings = [
        Reading(
            step=i + 1,
            loss=loss,
            grad_norm=norms[i] if norms else 1.0,
            lr=rates[i] if rates else 1e-4,
            update_ratio=ratios[i] if ratios else None,
        )
        for i, loss in enumerate(losses)
    ]
    said = traces.show(readings, lambda history, reading: detect(history, reading, settings))
    assert not any(f.veto for _, f in said)
    assert all(f.severity is Severity.ERROR for _, f in said)
    return said


def noisy(level: float, num_steps: int, seed: int, sigma: float = 0.06) -> list[float]:
    numbers = random.Random(seed)
    return [level * math.exp(sigma * numbers.gauss(0, 1)) for _ in range(num_steps)]


# Recorded: byte-level transformers of 0.2M parameters on Shakespeare, fp32, from the step of the change on.
ADAMW_RATE_10 = [2.7, 3.0, 1440.8, 3072.6, 2121.5, 1449.5, 1372.8]
ADAMW_RATE_1 = [2.5, 2.9, 29.6, 24.4, 36.3, 44.6, 11.9, 49.1, 47.3]
ADAMW_RATE_1_OTHER = [2.6, 2.6, 19.5, 51.5, 28.2, 46.4, 24.8, 42.1, 68.3]
SGD_RATE_2 = [3.3, 4.8, 6.0, 10.8, 8.3, 36.4, 189.2, 2402.4]
SGD_WARM_UP_TO_5 = [3.5, 3.3, 3.2, 3.1, 3.6, 3.4, 3.6, 3.6, 6.5, 33.0, 644.8, 7640.3, 295636.8]
# AdamW that warms up from 2e-3 to 1 in 60 steps; the loss as recorded, twenty steps of it.
ADAMW_WARM_UP = [2.5, 2.5, 2.9, 2.6, 2.9, 3.5, 4.1, 4.3, 4.0, 3.8, 4.0, 4.5, 3.9, 3.8, 4.4, 4.1, 3.8, 3.6, 4.2, 3.6]
# AdamW at a rate of 1 from the first step on, on a random model.
FROM_THE_START = [5.5, 5.2, 4.1, 5.7, 7.7, 6.1, 8.2, 6.0, 5.6, 5.1, 6.4, 4.7, 5.6, 6.8, 7.1, 6.0, 10.1, 9.7, 5.6, 11.5]
FROM_THE_START += [13.2, 12.1, 15.6, 12.0, 13.7, 10.2, 10.4, 12.9, 14.8, 12.5, 9.7, 9.8, 11.6, 13.5, 12.6, 12.0, 13.9]


@pytest.mark.parametrize(
    ("recorded", "jump", "within"),
    [
        (ADAMW_RATE_10, 1440.8, 2),
        (ADAMW_RATE_1, 29.6, 6),
        (ADAMW_RATE_1_OTHER, 19.5, 6),
        (SGD_RATE_2, 10.8, 6),
        (SGD_WARM_UP_TO_5, 33.0, 3),
    ],
)
def test_recorded_blow_ups_are_told_within_steps(
    traces: ModuleType, recorded: list[float], jump: float, within: int
) -> None:
    for seed in range(10):
        losses = [5.5, 5.0, 4.2, 3.6, 3.2, *noisy(2.8, 115, seed), *recorded]
        first = losses.index(jump) + 1
        said = said_of(traces, losses)
        assert said, seed
        assert first <= said[0][0] < first + within, seed


def test_a_warm_up_to_a_rate_far_too_high_is_told_while_it_goes_on(traces: ModuleType) -> None:
    past = noisy(2.7, 118, 1, 0.03)
    rates = [2e-3] * 118 + [2e-3 + 0.0166 * i for i in range(len(ADAMW_WARM_UP))]
    ratios = [0.0015 if i % 50 == 1 else None for i in range(len(rates))]
    said = said_of(traces, past + ADAMW_WARM_UP, rates=rates, ratios=ratios)
    assert [step for step, _ in said][:1] == [134]


def test_harder_data_during_a_sane_warm_up_is_no_runaway(traces: ModuleType) -> None:
    """The same losses; but the updates are small, or were never measured."""
    past = noisy(2.7, 118, 1, 0.03)
    rates = [2e-7] * 118 + [2e-7 + 1.66e-6 * i for i in range(len(ADAMW_WARM_UP))]
    small = [1.5e-7 if i % 50 == 1 else None for i in range(len(rates))]
    assert said_of(traces, past + ADAMW_WARM_UP, rates=rates, ratios=small) == []
    assert said_of(traces, past + ADAMW_WARM_UP, rates=rates) == []


def test_a_random_model_that_gets_nowhere_is_told(traces: ModuleType) -> None:
    said = said_of(traces, FROM_THE_START)
    assert [step for step, _ in said][:1] == [31]


def test_one_absurd_loss_is_enough_at_the_start(traces: ModuleType) -> None:
    """A rate of 1000 and clipping: 4.19, 8.7e6, and then guessing with a gradient of 0."""
    said = said_of(traces, [4.19, 8.7e6, 4.159, 4.159], norms=[2.0, 1e5, 0.0, 0.0])
    assert [step for step, _ in said] == [2]


def test_a_climb_by_degrees_is_told_before_it_is_ten_times_the_usual(traces: ModuleType) -> None:
    for seed in range(40):
        numbers = random.Random(seed)
        losses, level = noisy(2.0, 80, seed), 2.0
        rate = numbers.uniform(1.08, 1.3)
        while level < 20.0:
            level *= rate
            losses.append(level * math.exp(0.05 * numbers.gauss(0, 1)))
        said = said_of(traces, losses)
        assert said, seed
        assert said[0][0] <= len(losses), seed


def test_a_model_that_guesses_is_told_long_before_a_divergence(traces: ModuleType) -> None:
    losses = [*noisy(2.4, 60, 2), 9.8, 12.0, 11.2, *noisy(10.8, 40, 3, 0.01)]
    said = said_of(traces, losses)
    slow = traces.show(
        [Reading(step=i + 1, loss=x, grad_norm=1.0) for i, x in enumerate(losses)], traces.of(divergence)
    )
    assert said[0][0] == 66
    assert slow[0][0] > 90


def test_a_small_vocabulary_needs_its_size_to_be_known(traces: ModuleType) -> None:
    losses = noisy(2.0, 60, 2) + noisy(5.55, 30, 3, 0.02)
    assert said_of(traces, losses) == []
    assert said_of(traces, losses, config=Config(guess_loss=math.log(256)))[0][0] == 66


@pytest.mark.parametrize("times", [3.0, 8.0, 30.0, 1000.0])
def test_a_rare_row_that_is_over_at_once_is_no_runaway(traces: ModuleType, times: float) -> None:
    for seed in range(10):
        losses = noisy(1.8, 200, seed)
        for at in (30, 40 + seed * 9, 190):
            losses[at] *= times
        assert said_of(traces, losses) == [], seed


@pytest.mark.parametrize("times", [1.5, 2.0, 2.8])
def test_data_that_is_harder_from_one_step_on_is_no_runaway(traces: ModuleType, times: float) -> None:
    for seed in range(20):
        assert said_of(traces, noisy(1.5, 90, seed, 0.1) + noisy(1.5 * times, 90, 50 + seed, 0.1)) == [], seed


def test_up_to_five_very_hard_batches_in_a_row_are_no_runaway(traces: ModuleType) -> None:
    losses = noisy(1.5, 90, 4) + [8.0] * 5 + noisy(1.5, 60, 5)
    assert said_of(traces, losses) == []


def test_a_random_model_that_learns_is_no_runaway(traces: ModuleType) -> None:
    for seed in range(20):
        noise = noisy(1.0, 200, seed, 0.1)
        assert said_of(traces, [n * (2.0 + 8.8 * math.exp(-i / 30)) for i, n in enumerate(noise)]) == []


def test_an_easy_first_batch_makes_no_runaway(traces: ModuleType) -> None:
    for seed in range(20):
        assert said_of(traces, [0.05, *noisy(3.0, 100, seed, 0.4)]) == [], seed


def test_a_restart_is_no_runaway(traces: ModuleType) -> None:
    """The optimizer's moments are gone: a bump of half a nat that goes away."""
    for seed in range(20):
        losses = noisy(1.8, 100, seed)
        losses += [n + 0.8 * math.exp(-i / 15) for i, n in enumerate(noisy(1.8, 100, seed + 100))]
        assert said_of(traces, losses) == [], seed


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -3.0])
def test_what_has_no_logarithm_is_not_judged_and_spoils_nothing(traces: ModuleType, bad: float) -> None:
    losses = [*noisy(2.4, 60, 2), 9.8, bad, 12.0, 11.2, bad, 10.8, 10.9, 10.8]
    assert [step for step, _ in said_of(traces, losses)] == [68]


def test_losses_around_zero_are_left_alone(traces: ModuleType) -> None:
    """Reinforcement learning: nothing is known of the scale of such a loss."""
    history = History()
    history.committed(-1.0, 1.0)
    assert detect(history, Reading(step=2, loss=100.0, grad_norm=1.0), Config()) is None


def test_the_largest_numbers_do_not_raise(traces: ModuleType) -> None:
    assert said_of(traces, [1.0] * 30 + [1.7976931348623157e308] * 10) != []
    assert said_of(traces, [5e-324] * 30 + [1.0] * 10) is not None
