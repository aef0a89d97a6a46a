"""Windows that refuse non-finite values: a statistic that swallowed one NaN would be blind for ever."""

from __future__ import annotations

import json
import math
import random
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finitune.core.robust import MAD_TO_SIGMA, History, Window
from finitune.core.types import Reading

BAD = (math.nan, math.inf, -math.inf)
finite = st.floats(allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize("bad", BAD)
def test_a_non_finite_value_is_refused_and_counted(bad: float) -> None:
    window = Window(3)
    assert window.add(1.0)
    assert not window.add(bad)
    assert list(window) == [1.0]
    assert window.num_refused == 1
    assert window.median() == 1.0


@given(st.lists(st.floats()), st.integers(1, 8))
def test_a_window_holds_the_last_finite_values(values: list[float], size: int) -> None:
    window = Window(size)
    for value in values:
        window.add(value)
    good = [v for v in values if math.isfinite(v)]
    assert list(window) == good[-size:]
    assert window.num_refused == len(values) - len(good)
    assert len(window) <= size


@given(st.lists(st.one_of(finite, st.sampled_from(BAD)), min_size=1).filter(lambda v: any(map(math.isfinite, v))))
def test_statistics_are_those_of_the_finite_values_alone(values: list[float]) -> None:
    poisoned, clean = Window(1000), Window(1000)
    for value in values:
        poisoned.add(value)
        if math.isfinite(value):
            clean.add(value)
    assert poisoned.median() == clean.median() == median(v for v in values if math.isfinite(v))
    assert repr(poisoned.sigma()) == repr(clean.sigma())


def test_an_empty_window_has_no_statistics() -> None:
    assert math.isnan(Window(4).median())
    assert math.isnan(Window(4).sigma())


@pytest.mark.parametrize("size", [0, -1])
def test_a_window_of_nothing_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="size"):
        Window(size)


def test_equal_values_have_no_spread() -> None:
    window = Window(9)
    for _ in range(9):
        window.add(-0.0)
    assert window.sigma() == 0.0


def test_sigma_estimates_the_standard_deviation_and_ignores_outliers() -> None:
    numbers = random.Random(0)
    window = Window(4000)
    for _ in range(3900):
        window.add(numbers.gauss(5.0, 2.0))
    for _ in range(100):
        window.add(1e12)
    assert window.sigma() == pytest.approx(2.0, rel=0.06)
    assert window.median() == pytest.approx(5.0, abs=0.15)


def test_the_constant_is_that_of_the_normal_distribution() -> None:
    """Phi(1 / MAD_TO_SIGMA) = 3/4."""
    phi = 0.5 * (1.0 + math.erf(1.0 / MAD_TO_SIGMA / math.sqrt(2.0)))
    assert phi == pytest.approx(0.75, abs=1e-15)


@given(st.lists(st.floats(), max_size=20))
def test_a_window_survives_json_bit_for_bit(values: list[float]) -> None:
    window, other = Window(7), Window(1)
    for value in values:
        window.add(value)
    other.load(json.loads(json.dumps(window.state())))
    assert repr(other.state()) == repr(window.state())


def committed(*losses: float, norm: float = 1.0) -> History:
    history = History(8)
    for loss in losses:
        history.committed(loss, norm)
    return history


def test_logarithms_of_positive_values_enter_the_windows() -> None:
    history = committed(1.0, math.e)
    assert list(history.log_loss) == [0.0, 1.0]
    assert list(history.log_grad_norm) == [0.0, 0.0]
    assert history.num_committed == 2


@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, math.nan, math.inf, -math.inf])
def test_what_has_no_finite_logarithm_does_not(value: float) -> None:
    history = committed(value, norm=value)
    assert len(history.log_loss) == len(history.log_grad_norm) == 0
    assert history.num_committed == 1


def test_the_first_finite_loss_and_headroom_are_kept() -> None:
    history = History()
    history.committed(math.nan, 1.0, headroom_bits=math.inf)
    history.committed(-2.0, 1.0, headroom_bits=3.0)
    history.committed(5.0, 1.0, headroom_bits=1.0)
    assert history.first_loss == -2.0
    assert history.first_headroom_bits == 3.0


def test_an_abort_moves_counters_only() -> None:
    history = committed(1.0, 2.0)
    before = history.state()
    history.aborted()
    history.aborted()
    history.overflowed()
    after = history.state()
    assert (history.num_aborted, history.aborts_in_a_row) == (2, 2)
    assert (history.num_overflows, history.overflows_in_a_row) == (1, 1)
    for window in ("log_loss", "log_grad_norm", "changed_fraction"):
        assert after[window] == before[window]


def test_order_statistics_stay_right_while_values_leave_the_window() -> None:
    numbers = random.Random(1)
    window, values = Window(9), []
    for _ in range(400):
        values.append(numbers.choice([numbers.gauss(0, 1), 0.0, -0.0, 1.0, 1e300]))
        window.add(values[-1])
        last = values[-9:]
        assert window.median() == median(last)
        assert window.sigma() == MAD_TO_SIGMA * median(abs(v - median(last)) for v in last)
        assert window.tail(3) == last[-3:]
    assert window.tail(0) == []
    assert window.tail(99) == values[-9:]


def reading(**fields: object) -> Reading:
    return Reading(**{"step": 1, "loss": 2.0, "grad_norm": 1.0} | fields)  # type: ignore[arg-type]


def test_a_reading_brings_everything_that_was_measured() -> None:
    history = History()
    history.commit(reading(lr=1e-3, headroom_bits=2.5, loss_scale=1024.0))
    history.commit(reading(lr=2e-3, update_ratio=1e-4, changed_fraction=0.5))
    history.overflowed()
    assert list(history.headroom_bits) == [2.5]
    assert list(history.log2_scale) == [10.0]
    assert list(history.update_ratio) == [1e-4]
    assert list(history.changed_fraction) == [0.5]
    assert list(history.log_lr) == [math.log(1e-3), math.log(2e-3)]
    assert list(history.overflows) == [0.0, 0.0, 1.0]
    # The ratio is that of the step before, and so is the rate that it is divided by.
    assert list(history.log_update_per_lr) == pytest.approx([math.log(1e-4 / 1e-3)])


def test_every_headroom_knows_its_step() -> None:
    history = History()
    for bits in (None, 3.0, math.nan, -math.inf, 2.0, math.inf, None, 1.0):
        history.commit(reading(headroom_bits=bits))
    assert list(history.headroom_bits) == [3.0, 2.0, 1.0]
    assert list(history.headroom_at) == [1.0, 4.0, 7.0]
    assert history.num_headrooms == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_odd_measurements_enter_no_logarithm(bad: float) -> None:
    history = History()
    history.commit(reading(lr=bad, update_ratio=bad, loss_scale=bad, headroom_bits=bad))
    history.commit(reading(lr=1e-3, update_ratio=bad))
    for window in (history.log2_scale, history.log_update_per_lr):
        assert list(window) == []
    assert list(history.log_lr) == [math.log(1e-3)]
    assert all(math.isfinite(v) for v in (*history.update_ratio, *history.headroom_bits))


def test_the_record_of_an_older_version_is_taken_and_the_rest_begins_empty() -> None:
    """Runs that were begun before these windows existed go on."""
    old = committed(1.0, 2.0, 3.0).state()
    later = {"headroom_bits", "headroom_at", "update_ratio", "log_update_per_lr", "log_lr", "log2_scale", "overflows"}
    record = {k: v for k, v in old.items() if k not in later | {"num_headrooms"}}
    assert set(record) != set(old)
    used = History()
    for _ in range(5):
        used.commit(reading(lr=1e-3, headroom_bits=2.5, loss_scale=8.0, update_ratio=0.1))
    used.overflowed()
    used.load(json.loads(json.dumps(record)))
    assert list(used.log_loss) == list(committed(1.0, 2.0, 3.0).log_loss)
    assert all(list(getattr(used, name)) == [] for name in later)
    assert used.num_headrooms == 0
    used.commit(reading(headroom_bits=1.0))
    assert list(used.headroom_bits) == [1.0]


def test_a_commit_ends_the_rows_but_not_the_totals() -> None:
    history = History()
    history.aborted()
    history.overflowed()
    history.committed(1.0, 1.0)
    assert (history.aborts_in_a_row, history.overflows_in_a_row) == (0, 0)
    assert (history.num_aborted, history.num_overflows) == (1, 1)


@given(st.lists(st.tuples(st.floats(), st.floats(), st.one_of(st.none(), st.floats()), st.integers(0, 2)), max_size=12))
def test_a_history_survives_json_bit_for_bit(events: list[tuple[float, float, float | None, int]]) -> None:
    history, other = History(5), History(5)
    for loss, norm, share, kind in events:
        if kind == 0:
            history.committed(
                loss, norm, changed_fraction=share, headroom_bits=share, update_ratio=share, loss_scale=share, lr=share
            )
        elif kind == 1:
            history.aborted()
        else:
            history.overflowed()
    other.load(json.loads(json.dumps(history.state(), allow_nan=False)))
    assert repr(other.state()) == repr(history.state())


LOGS = st.lists(st.floats(-750.0, 750.0) | st.sampled_from([0.0, -0.0, 5e-324, -5e-324]), min_size=2, max_size=160)
CHANCES = st.floats(1e-9, 0.5)


@given(LOGS, CHANCES, st.floats(1e-3, 2.0), st.booleans())
def test_the_limit_of_a_tail_is_a_number_beyond_the_record(
    values: list[float], chance: float, prior: float, newest: bool
) -> None:
    window = Window(128, peaks=True)
    for value in values:
        window.add(value)
    if newest and len(window) < 12:
        return
    capped = window.tail_limit(chance, prior, without_newest=newest)
    own = window.tail_limit(chance, prior, without_newest=newest, own_tail=True)
    assert math.isfinite(capped)
    assert math.isfinite(own)
    assert own >= capped
    assert newest or capped >= max(window)


@given(LOGS, st.booleans())
def test_what_is_less_likely_is_further_out(values: list[float], own: bool) -> None:
    window = Window(128, peaks=True)
    for value in values:
        window.add(value)
    limits = [window.tail_limit(chance, 0.2, own_tail=own) for chance in (1e-3, 1e-5, 1e-7)]
    assert limits == sorted(limits)


def test_a_tail_without_a_variance_is_believed_in_where_it_was_shown() -> None:
    """A power law of exponent 1/2: the capped limit knows its record, the other one its tail."""
    chance, window = random.Random(2), Window(128, peaks=True)
    for _ in range(400):
        window.add(math.log(chance.paretovariate(0.5)))
    capped, own = (window.tail_limit(1e-6, 0.2, own_tail=own) for own in (False, True))
    assert own > capped + 3.0


def test_a_light_tail_is_the_same_either_way() -> None:
    noise, window = random.Random(2), Window(128, peaks=True)
    for _ in range(400):
        window.add(noise.gauss(0.0, 0.3))
    assert window.tail_limit(1e-6, 0.2, own_tail=True) == window.tail_limit(1e-6, 0.2)


@pytest.mark.parametrize(
    ("losses", "signed"),
    [
        ((), False),
        ((1.0, 2.0), False),
        ((1.0, -1.0), True),
        ((-5e-324, 5e-324), True),
        ((0.0, -0.0, 1.0), False),
        ((0.0,) * 50 + (0.1, -0.1), True),
        ((1.0,) * 18 + (-1.0, -1.0), False),
        ((1.0,) * 17 + (-1.0, -1.0), True),
        ((math.nan, math.inf, -math.inf, 1.0), False),
    ],
)
def test_losses_of_either_sign_are_known_by_a_tenth_below_zero(losses: tuple[float, ...], signed: bool) -> None:
    history = committed(*losses)
    assert history.is_signed == signed
    other = History(8)
    other.load(json.loads(json.dumps(history.state())))
    assert other.is_signed == signed


def test_an_older_record_of_a_policy_gradient_is_still_one() -> None:
    """It did not tell losses of 0 from those below."""
    state = committed(0.1, -0.1, 0.2, -0.3).state()
    del state["num_negative"]
    history = History(8)
    history.load(state)
    assert history.is_signed
