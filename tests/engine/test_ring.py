"""The ring of snapshots: within its memory, cheap enough, reaching far back, and losing nothing when memory ends."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finitune.core.types import Reading
from finitune.engine.policy import Action
from finitune.engine.snapshot import (
    Buffers,
    Distance,
    Snapshot,
    SnapshotRing,
    as_snapshot,
    dispensable,
    is_out_of_memory,
    state_bytes,
)
from finitune.numerics.digest import digest
from finitune.train.step import TrainPort
from support.small_port import small_port, train


def bits(port: TrainPort) -> str:
    return digest(port.state_tensors(), port.state_record())


def bits_of(snapshot: Snapshot) -> str:
    return digest(snapshot.tensors.items(), snapshot.record)


def pointers(ring: SnapshotRing) -> set[int]:
    return {t.data_ptr() for s in ring.taken for t in s.tensors.values()}


class ScarceMemory:
    """``torch.empty`` that fails like torch's CPU allocator once ``left`` calls are used up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
        self.left, self.real = left, torch.empty
        monkeypatch.setattr(torch, "empty", self)

    def __call__(self, *args: Any, **kw: Any) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return self.real(*args, **kw)


# ---------------------------------------------------------------- memory


def test_once_the_ring_is_full_no_new_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    port, ring = small_port(), SnapshotRing(4)
    train(port, 1)  # the moments are there
    for _ in range(4):
        assert ring.take(port, 0.0) is not None
        train(port, 1)
    held = pointers(ring)
    ScarceMemory(monkeypatch, left=0)
    for _ in range(20):
        assert ring.take(port, 0.0) is not None
        train(port, 1)
        assert pointers(ring) == held
        assert len(ring.taken) == 4
        assert all(s.intact() for s in ring.taken)


def test_every_snapshot_in_the_ring_has_memory_of_its_own() -> None:
    port, ring = small_port(), SnapshotRing(3)
    truth = {}
    for _ in range(9):
        snapshot = ring.take(port, 0.0)
        truth[snapshot.step] = bits(port)
        train(port, 1)
    assert len(pointers(ring)) == sum(len(s.tensors) for s in ring.taken)
    assert {s.step: bits_of(s) for s in ring.taken} == {s.step: truth[s.step] for s in ring.taken}


def test_buffers_are_used_again_also_by_a_state_with_fewer_tensors() -> None:
    port, buffers = small_port(), Buffers()
    start = as_snapshot(port)
    train(port, 1)
    first = buffers.take(port)
    places = {n: t.data_ptr() for n, t in first.tensors.items()}
    start.restore(port)
    second = buffers.take(port)
    assert set(second.tensors) == set(start.tensors)
    assert all(t.data_ptr() == places[n] for n, t in second.tensors.items())
    train(port, 1)
    third = buffers.take(port)
    assert {n: t.data_ptr() for n, t in third.tensors.items()} == places


@given(st.integers(0, 10_000), st.integers(1, 1000), st.integers(1, 64))
@settings(deadline=None)
def test_the_slots_fit_the_budget_and_the_count(budget: int, size: int, count: int) -> None:
    ring = SnapshotRing.within(budget, size, max_count=count)
    assert 0 <= ring.num_slots <= count
    assert ring.num_slots * size <= budget
    assert ring.num_slots == count or (ring.num_slots + 1) * size > budget


def test_a_state_of_no_bytes_does_not_break_the_budget() -> None:
    assert SnapshotRing.within(100, 0, max_count=3).num_slots == 3
    assert SnapshotRing.within(0, 0, max_count=3).num_slots == 0


def test_a_full_ring_takes_the_bytes_it_says() -> None:
    port = small_port()
    train(port, 1)
    size = state_bytes(port)
    assert size == sum(4 * p.numel() * 3 + 4 for _, p in port.parts.parameters)  # weight, two moments, step count
    ring = SnapshotRing.within(3 * size + size // 2, size, max_count=8)
    for _ in range(6):
        ring.take(port, 0.0)
        train(port, 1)
    assert sum(s.num_bytes for s in ring.taken) == 3 * size


def test_without_a_budget_nothing_is_ever_due() -> None:
    ring = SnapshotRing.within(0, 100, max_count=8)
    assert not any(ring.due(step) for step in range(100))


def test_a_ring_of_one_holds_the_newest() -> None:
    port, ring = small_port(), SnapshotRing(1)
    for _ in range(5):
        ring.take(port, 0.0)
        assert [s.step for s in ring.taken] == [port.state.step]
        assert ring.taken[0].intact()
        train(port, 1)


# ---------------------------------------------------------------- no memory left


@pytest.mark.parametrize("left", [0, 5])
def test_without_memory_for_one_more_the_ring_stays_as_small_as_it_is(
    monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    port, ring = small_port(), SnapshotRing(8)
    train(port, 1)
    for _ in range(3):
        ring.take(port, 0.0)
        train(port, 1)
    before, there = [(s.step, bits_of(s)) for s in ring.taken], bits(port)
    scarce = ScarceMemory(monkeypatch, left)
    assert ring.take(port, 0.0) is None
    assert bits(port) == there
    assert [(s.step, bits_of(s)) for s in ring.taken] == before
    assert ring.num_slots == 3
    train(port, 1)
    scarce.left = 0
    assert ring.take(port, 0.0) is not None, "a slot that is there is used again"
    assert len(ring.taken) == 3
    assert ring.taken[-1].step == port.state.step


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_no_snapshot_is_lost_where_memory_for_its_successor_fails(
    monkeypatch: pytest.MonkeyPatch, num_slots: int
) -> None:
    """The first one was taken before the moments existed: the slot needs more memory when it is used again."""
    port, ring = small_port(), SnapshotRing(num_slots)
    for _ in range(num_slots):  # no update yet: all slots are small
        ring.take(port, 0.0)
        port.settle(Action.SKIP_BATCH, Reading(port.state.step + 1, math.nan, math.nan), clean=False)
    train(port, 1)
    before = [(s.step, bits_of(s)) for s in ring.taken]
    ScarceMemory(monkeypatch, left=3)
    assert ring.take(port, 0.0) is None
    assert [(s.step, bits_of(s)) for s in ring.taken] == before
    assert all(s.intact() for s in ring.taken)


def test_a_run_out_of_memory_for_good_keeps_every_snapshot_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    port, ring = small_port(), SnapshotRing(4)
    ring.take(port, 0.0)
    train(port, 1)
    ring.take(port, 0.0)
    ScarceMemory(monkeypatch, left=0)
    steps = [s.step for s in ring.taken]
    for _ in range(5):
        train(port, 1)
        if ring.due(port.state.step):
            ring.take(port, 0.0)
    assert ring.taken, "the last snapshots must not be given up for one that cannot be taken"
    assert ring.taken[0].step == steps[0] or len(ring.taken) == len(steps)
    assert all(s.intact() for s in ring.taken)


def test_the_very_first_snapshot_may_fail_too(monkeypatch: pytest.MonkeyPatch) -> None:
    port, ring = small_port(), SnapshotRing(4)
    ScarceMemory(monkeypatch, left=0)
    assert ring.take(port, 0.0) is None
    assert not ring.due(1)


def test_any_other_error_is_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    port, ring = small_port(), SnapshotRing(4)

    def broken(*_args: Any, **_kw: Any) -> torch.Tensor:
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    monkeypatch.setattr(torch, "empty", broken)
    with pytest.raises(RuntimeError, match="size of tensor"):
        ring.take(port, 0.0)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000000 bytes."),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8000000 bytes."),
        RuntimeError("CUDA error: out of memory"),
    ],
    ids=["python", "cuda", "linux", "windows", "pinned"],
)
def test_a_lack_of_memory_is_known_in_all_its_words(error: BaseException) -> None:
    """The allocator's words on Windows are others than on Linux; pinned host memory fails as a CUDA error."""
    assert is_out_of_memory(error)


# ---------------------------------------------------------------- which are kept


def _thinned(num_slots: int, distances: list[int]) -> Iterator[list[int]]:
    """The steps in a ring while snapshots come at these distances."""
    steps, now = [0], 0
    for distance in distances:
        now += distance
        if len(steps) == num_slots:
            steps.pop(dispensable(steps))
        steps.append(now)
        yield steps


@given(st.integers(3, 10), st.lists(st.integers(1, 40), min_size=1, max_size=300))
@settings(max_examples=80, deadline=None)
def test_the_oldest_and_the_newest_two_always_stay(num_slots: int, distances: list[int]) -> None:
    last = 0
    for steps in _thinned(num_slots, distances):
        assert steps[0] == 0
        assert steps == sorted(set(steps))
        assert len(steps) <= num_slots
        assert last in steps, "the newest one is never given up for its successor"
        last = steps[-1]


@given(st.integers(4, 12), st.integers(1, 7), st.integers(20, 250))
@settings(max_examples=40, deadline=None)
def test_the_distances_grow_with_age(num_slots: int, distance: int, count: int) -> None:
    """The oldest stays for ever, so its hole may be any; from there on each hole is at least as large as the next."""
    for steps in _thinned(num_slots, [distance] * count):
        holes = [b - a for a, b in pairwise(steps)][1:]
        assert holes == sorted(holes, reverse=True), steps


@given(st.integers(8, 16), st.integers(1, 7), st.integers(20, 400))
@settings(max_examples=40, deadline=None)
def test_eight_snapshots_are_dense_near_the_end_and_reach_far_back(num_slots: int, distance: int, count: int) -> None:
    """Each age is a bounded multiple of the next (measured: 17 with eight slots, 4.7 with twelve, 2.8 with sixteen)."""
    for steps in _thinned(num_slots, [distance] * count):
        ages = [steps[-1] - step for step in steps]
        if len(ages) == num_slots:
            assert ages[-2] == distance
            assert ages[-3] <= 8 * distance
            assert all(older <= 20 * newer for older, newer in pairwise(ages[:-1])), ages


@pytest.mark.parametrize(("steps", "expected"), [([5], 0), ([5, 9], 0), ([0, 1, 2], 1), ([0, 1, 50, 51, 52], 1)])
def test_which_one_gives_way(steps: list[int], expected: int) -> None:
    assert dispensable(steps) == expected


def test_going_back_forgets_what_came_after_and_uses_its_memory_again(monkeypatch: pytest.MonkeyPatch) -> None:
    port, ring = small_port(), SnapshotRing(6)
    train(port, 1)
    for _ in range(6):
        ring.take(port, 0.0)
        train(port, 1)
    held = pointers(ring)
    ring.forget_after(3)
    assert [s.attempt for s in ring.taken] == [1, 2, 3]
    ring.taken[-1].restore(port)
    ScarceMemory(monkeypatch, left=0)
    for _ in range(8):
        train(port, 1)
        assert ring.take(port, 0.0) is not None
    assert pointers(ring) == held
    assert [s.step for s in ring.taken] == sorted({s.step for s in ring.taken})
    assert all(s.intact() for s in ring.taken)


def test_going_back_beyond_all_of_them_leaves_an_empty_ring_in_which_one_is_due() -> None:
    port, ring = small_port(), SnapshotRing(3)
    train(port, 2)
    ring.take(port, 0.0)
    ring.forget_after(0)
    assert ring.taken == []
    assert ring.due(1)


def test_forgetting_is_by_identity_and_leaves_the_others() -> None:
    port, ring = small_port(), SnapshotRing(3)
    first, second = ring.take(port, 0.0), ring.take(port, 0.0)  # equal in all values
    ring.forget(second)
    assert len(ring.taken) == 1
    assert ring.taken[0] is first


# ---------------------------------------------------------------- how often


def _simulated(cost_s: list[float], step_s: float, share: float) -> tuple[float, float]:
    """(seconds of snapshots, seconds of steps) of a run that takes one whenever it is due; costs come in turn."""
    distance, last, spent, count = Distance(share), 0, 0.0, 0
    num_steps = 20_000
    for step in range(1, num_steps + 1):
        if step - last >= distance.steps:
            cost = cost_s[min(count, len(cost_s) - 1)]
            count, last, spent = count + 1, step, spent + cost
            distance.measured(cost, step_s)
    return spent, num_steps * step_s


@given(
    st.floats(1e-4, 1.0),
    st.floats(1e-3, 2.0),
    st.sampled_from([0.001, 0.01, 0.05, 0.2]),
    st.floats(1.0, 8.0),
)
@settings(max_examples=60, deadline=None)
def test_the_cost_stays_under_its_share_of_the_time(cost: float, step_s: float, share: float, first: float) -> None:
    """The first eight fill memory that was never touched and cost up to eight times as much."""
    spent, time_s = _simulated([first * cost] * 8 + [cost], step_s, share)
    allowed = share * time_s * (1 + 1e-9) + first * cost  # one may be taken before anything is known
    assert spent <= allowed


def test_costs_that_vary_stay_under_their_share_as_well() -> None:
    """Every third one is four times as dear (a busy disk, another program): the mean counts, not the median."""
    spent, time_s = _simulated([0.02, 0.02, 0.08] * 2000, step_s=0.5, share=0.01)
    assert spent <= 0.01 * time_s * 1.05


def test_the_distance_is_one_until_a_step_was_timed_and_never_less() -> None:
    distance = Distance(0.01)
    distance.measured(5.0, 0.0)
    assert distance.steps == 1
    distance.measured(0.0, 1.0)
    assert distance.steps >= 1
    distance = Distance(0.5)
    distance.measured(1e-9, 1.0)
    assert distance.steps == 1


def test_without_being_asked_a_ring_takes_no_more_than_half_a_per_cent() -> None:
    """So that it fits, with the checks of a step, into the two per cent that watching a healthy run may cost."""
    assert SnapshotRing(2).distance.cost_share <= 0.005
    assert SnapshotRing.within(100, 10, max_count=2).distance.cost_share <= 0.005


def test_a_ring_measures_its_own_costs() -> None:
    port, ring = small_port(), SnapshotRing(2, cost_share=0.01)
    ring.take(port, 1e-9)
    assert ring.cost_s > 0
    assert ring.distance.steps >= ring.cost_s / (0.01 * 1e-9) * 0.99
    assert not ring.due(port.state.step + 1)
    assert ring.due(port.state.step + ring.distance.steps)
