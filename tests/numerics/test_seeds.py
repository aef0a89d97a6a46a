"""Seeds are functions of the counters, unlike for any two places, and the host's generators come back."""

from __future__ import annotations

import itertools
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finitune.numerics import seeds
from finitune.numerics.seeds import (
    GeneratorStates,
    generators_kept,
    generators_seeded,
    seed_all,
    seed_generators,
    seed_of,
)

counters = st.tuples(st.integers(0, 2**62), st.integers(0, 10**9), st.integers(0, 999), st.integers(0, 999))


@pytest.fixture(autouse=True)
def _hosts_generators():
    with generators_kept():
        yield


def draws() -> tuple[float, float, float, float]:
    """One number of each generator, and a Gaussian, of which numpy keeps the second half of a pair."""
    return torch.rand(1).item(), random.random(), float(np.random.rand()), float(np.random.randn())


@given(counters, counters)
def test_other_places_have_other_seeds(a, b) -> None:
    assert (seed_of(*a) == seed_of(*b)) == (a == b)
    assert 0 <= seed_of(*a) < 2**63


@given(counters, st.integers(0, 3), st.integers(1, 2**40))
def test_a_change_of_any_one_counter_changes_the_seed(a, which, by) -> None:
    b = [*a]
    b[which] = (b[which] + by) % 2**62
    assert (seed_of(*a) == seed_of(*b)) == (list(a) == b)


def test_counters_do_not_run_into_each_other() -> None:
    """All places of a small run at once: (step 1, micro 0) is not (step 0, micro 1), and so on."""
    places = list(itertools.product((0, 1, 42), range(40), range(8), range(8)))
    assert len({seed_of(*p) for p in places}) == len(places)
    # torch's CPU generator takes the low half of a seed only; the halves are unlike as well.
    assert len({seed_of(*p) % 2**32 for p in places}) == len(places)


def test_streams_are_apart() -> None:
    assert len({seed_of(1, 2, stream=s) for s in ("train", "sample", "eval", "")}) == 4


def test_the_seed_of_a_place_is_the_same_in_every_release() -> None:
    """Stored runs are resumed by later versions: the scheme may not move."""
    assert seed_of(42, 0) == 1791884014965354361
    assert seed_of(42, 7, 3, 1, "sample") == 6006045043240099991


def test_a_step_draws_the_same_whatever_was_drawn_before() -> None:
    seed_generators(7, 3)
    first = draws()
    [draws() for _ in range(99)]
    seed_generators(7, 4)
    other = draws()
    seed_generators(7, 3)
    assert draws() == first
    assert not set(other) & set(first)


def test_numpys_generator_is_seeded_whatever_kind_the_host_put_in_place() -> None:
    held = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(1))
        seed_all(5)
        first = draws()
        seed_all(5)
        assert draws() == first
        with generators_kept():
            draws()
        after = draws()
        seed_all(5)
        draws()
        assert draws() == after
    finally:
        np.random.set_bit_generator(held)


def test_the_hosts_generators_are_given_back_as_they_were() -> None:
    np.random.randn()  # of a pair of Gaussians the second is held back, and belongs to the state
    states = GeneratorStates.now()
    expected = draws()
    states.restore()
    with generators_seeded(3):
        inside = draws()
    assert draws() == expected
    seed_all(3)
    assert draws() == inside


def test_the_hosts_generators_are_given_back_after_an_error() -> None:
    states = GeneratorStates.now()
    expected = draws()
    states.restore()
    with pytest.raises(ZeroDivisionError), generators_seeded(3):
        raise ZeroDivisionError
    assert draws() == expected


def accelerator(**more) -> SimpleNamespace:
    """A stand-in for ``torch.cuda`` and its like; two devices."""
    made = SimpleNamespace(seeds=[], states=[torch.tensor([1]), torch.tensor([2])], restored=None)
    made.manual_seed_all = made.seeds.append
    made.get_rng_state_all = lambda: made.states
    made.set_rng_state_all = lambda states: setattr(made, "restored", states)
    for name, value in more.items():
        setattr(made, name, value)
    return made


def put_in_place(monkeypatch: pytest.MonkeyPatch, module: SimpleNamespace) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch, "get_device_module", lambda _device: module)


def test_an_accelerator_in_use_is_seeded_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    module = accelerator(is_initialized=lambda: True)
    put_in_place(monkeypatch, module)
    with generators_seeded(11):
        assert module.seeds == [11]
        module.states = []
    assert [int(s) for s in module.restored] == [1, 2]


def test_an_accelerator_that_nobody_used_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking it for its state would start it: a second, and hundreds of megabytes of its memory."""
    module = accelerator(is_initialized=lambda: False, get_rng_state_all=lambda: pytest.fail("started"))
    put_in_place(monkeypatch, module)
    with generators_seeded(11):
        pass
    assert module.seeds == []
    assert module.restored is None


def test_an_accelerator_of_one_device_without_lists_is_seeded_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's: no ``is_initialized``, no ``_all``."""
    module = SimpleNamespace(seeds=[], restored=None)
    module.manual_seed = module.seeds.append
    module.get_rng_state = lambda: torch.tensor([7])
    module.set_rng_state = lambda state: setattr(module, "restored", state)
    put_in_place(monkeypatch, module)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with generators_seeded(11):
        assert module.seeds == [11]
    assert int(module.restored) == 7


def test_the_present_accelerator_is_found_by_torchs_own_word() -> None:
    if torch.accelerator.is_available():
        pytest.skip("needs a machine without accelerator")
    assert seeds._accelerator_in_use() is None


def test_seeding_costs_less_than_a_tenth_of_a_millisecond_deep_in_a_call() -> None:
    """``torch.manual_seed`` formats the call stack three times where no accelerator is in use."""

    def deep(levels: int) -> float:
        if levels:
            return deep(levels - 1)
        costs_s = []
        for step in range(200):
            started_s = time.perf_counter()
            seed_generators(1, step)
            costs_s.append(time.perf_counter() - started_s)
        return min(costs_s)

    assert deep(40) < 1e-4
