"""A leap of loss and gradient by one factor is suspected, and believed only where a step of the past has it too."""

from __future__ import annotations

import math
from random import Random

import pytest

from finitune.core.robust import History
from finitune.engine.rescaled import Again, Past, before_the_leap, leapt


def run(losses: list[float], norms: list[float]) -> list[bool]:
    """Whether each step of a run looks like a leap."""
    history, found = History(), []
    for loss, norm in zip(losses, norms, strict=True):
        history.committed(loss, norm)
        found.append(leapt(history))
    return found


def noisy(count: int, seed: int, *, loss: float = 0.05, norm: float = 0.25) -> tuple[list[float], list[float]]:
    random = Random(seed)
    losses = [2.0 * 0.99**i * math.exp(random.gauss(0, loss)) for i in range(count)]
    return losses, [math.exp(random.gauss(0, norm)) for _ in range(count)]


@pytest.mark.parametrize("factor", [2.0, 8.0, 64.0, 0.5, 0.125])
def test_a_leap_of_both_is_seen_at_its_third_step_and_once(factor: float) -> None:
    losses, norms = noisy(60, seed=1)
    losses[30:], norms[30:] = [x * factor for x in losses[30:]], [x * factor for x in norms[30:]]
    assert [i for i, seen in enumerate(run(losses, norms)) if seen] == [32]


@pytest.mark.parametrize("seed", range(8))
def test_noise_hardly_ever_is_a_leap(seed: int) -> None:
    assert sum(run(*noisy(400, seed, loss=0.4, norm=0.6))) <= 4


def test_a_loss_that_leaps_alone_and_a_slow_climb_are_none() -> None:
    losses, norms = noisy(60, seed=2)
    assert not any(run([x * (4 if i > 30 else 1) for i, x in enumerate(losses)], norms))
    climb = [x * 1.1 ** max(0, i - 30) for i, x in enumerate(losses)]
    assert not any(run(climb, [x * 1.1 ** max(0, i - 30) for i, x in enumerate(norms)]))


def test_losses_of_0_and_short_runs_are_passed() -> None:
    assert not any(run([0.0] * 40, [0.0] * 40))
    assert not any(run([1.0] * 5 + [4.0] * 3, [1.0] * 5 + [4.0] * 3))


def step(number: int, loss: float, action: str = "proceed") -> dict[str, object]:
    return {"kind": "step", "step": number, "loss": loss, "grad_norm": 1.0, "action": action}


def test_the_past_is_what_the_journal_says_last_and_only_what_was_committed() -> None:
    records = [step(1, 9.0), step(2, 8.0), step(3, 7.0, "skip_batch"), step(4, math.nan), {"kind": "rollback"}]
    records += [step(2, 6.0)]
    known = Past.of(records, [0, 1, 2, 3, 7])
    assert [(p.base, p.loss) for p in known] == [(1, 6.0), (0, 9.0)]


def test_the_state_is_one_of_before_the_leap() -> None:
    known = [Past(base, 2.0, 1.0) for base in (29, 27, 26, 10)]
    assert before_the_leap(known, 30) == known[2]  # its step is 27; 28, 29 and 30 are on the new level
    assert before_the_leap(known[:2], 30) is None


@pytest.mark.parametrize(
    ("loss", "norm", "micros", "expected"),
    [
        (8.0, 4.0, 4, True),
        (0.5, 0.25, 4, True),
        (8.04, 3.97, 4, True),
        (8.0, 1.0, 4, False),
        (8.0, 4.0, 3, False),
        (2.0, 1.0, 4, False),
        (2.0, 1.0, 1, False),
        (math.nan, 4.0, 4, False),
        (-8.0, 4.0, 4, False),
    ],
)
def test_the_factor_is_that_of_the_micro_batches_or_its_inverse_in_both(
    loss: float, norm: float, micros: int, expected: bool
) -> None:
    assert Again(Past(3, 2.0, 1.0), loss, norm, micros).by_micros is expected
