"""The keeper: which checkpoints stand, and when they are trusted."""

from __future__ import annotations

import errno
import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finitune.core.types import Reading
from finitune.engine.policy import Action
from finitune.train import checkpoint, keeper
from finitune.train.keeper import step_in
from support.keeping import FULL, Kept, quick_write
from support.small_port import small_port


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "write", quick_write)


@pytest.fixture
def kept(tmp_path: Path, quick: None) -> Iterator[Callable[..., Kept]]:
    made: list[Kept] = []

    def make(**fields: Any) -> Kept:
        made.append(Kept(tmp_path, **fields))
        return made[-1]

    yield make
    for each in made:
        each.journal.abandon()


# ---------------------------------------------------------------- rotation


def to_be_kept(here: list[int], trusted: set[int], limit: int, every: int | None, best: int | None) -> set[int]:
    """The rule in its own words: the newest ``limit``, the last trusted, the oldest candidate after it, milestones,
    the best.
    """
    last_trusted = max((s for s in here if s in trusted), default=None)
    later = [s for s in here if last_trusted is None or s > last_trusted]
    kept = set(sorted(here)[-limit:])
    if last_trusted is not None:
        kept.add(last_trusted)
    if later:
        kept.add(min(later))
    return kept | {s for s in here if s == best or (every and s % every == 0)}


PLAN = st.lists(st.tuples(st.sampled_from(["step"] * 3 + ["save"] * 2 + ["unclean"]), st.integers(1, 4)), max_size=25)


@given(
    plan=PLAN,
    limit=st.integers(1, 4),
    every=st.sampled_from([None, 5, 8]),
    trust_steps=st.integers(1, 9),
    best=st.booleans(),
    losses=st.lists(st.sampled_from([3.0, 2.0, 1.0, math.nan]), min_size=60, max_size=60),
)
@settings(max_examples=25, deadline=None)
def test_what_stands_is_exactly_what_the_rule_keeps(
    tmp_path_factory: pytest.TempPathFactory,
    plan: list[tuple[str, int]],
    limit: int,
    every: int | None,
    trust_steps: int,
    best: bool,
    losses: list[float],
) -> None:
    folder = tmp_path_factory.mktemp("rotation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write", quick_write)
        run = Kept(folder, limit=limit, every_steps=every, best=best, trust_steps=trust_steps)
        standing: set[int] = set()
        trusted: set[int] = set()
        flags: list[bool] = []
        lowest: tuple[float, int] | None = None
        for what, count in plan:
            for _ in range(count if what != "save" else 1):
                number = len(flags) + 1
                flags.append(what != "unclean")
                if what == "save":
                    loss = losses[number % len(losses)]
                    run.keeper.evaluated(number, loss)
                    if loss < (lowest[0] if lowest else math.inf):
                        lowest = (loss, number)
                    standing = to_be_kept(
                        [*standing, number], trusted, limit, every, lowest[1] if best and lowest else None
                    )
                run.step(clean=flags[-1], save=what == "save")
                in_a_row = next((i for i, clean in enumerate(reversed(flags)) if not clean), len(flags))
                ripe = {s for s in standing - trusted if in_a_row >= trust_steps and s <= number - trust_steps}
                if ripe:
                    trusted |= ripe
                    standing = to_be_kept(list(standing), trusted, limit, every, lowest[1] if best and lowest else None)
                assert set(run.standing) == standing
                assert set(run.trusted) == trusted & standing
        run.journal.abandon()
    assert not run.findings


def test_a_short_distance_between_saves_does_not_rotate_every_candidate_away(kept: Callable[..., Kept]) -> None:
    """With two kept and a save every step, one candidate lives through the 15 later saves that it takes."""
    run = kept(limit=2, trust_steps=15)
    run.step(16, save=True)
    assert run.standing == [1, 15, 16]
    assert run.trusted == [1]
    run.step(14, save=True)
    assert run.trusted == [15], "a trusted one is never older than twice the delay"
    assert run.standing == [15, 29, 30]


def test_the_last_trusted_one_is_never_rotated_away(kept: Callable[..., Kept]) -> None:
    run = kept(limit=1, trust_steps=3)
    run.step(save=True)
    run.step(3)
    assert run.trusted == [1]
    for _ in range(20):
        run.step(save=True, clean=False)  # nothing is trusted from here on
    assert run.trusted == [1]
    assert run.standing == [1, 5, 24]


def test_milestones_stay_for_good(kept: Callable[..., Kept]) -> None:
    run = kept(limit=1, every_steps=10, trust_steps=2)
    run.step(45, every=5)
    assert set(run.standing) >= {10, 20, 30, 40}
    assert 15 not in run.standing


def test_the_best_stays_until_a_better_one_comes(kept: Callable[..., Kept]) -> None:
    run = kept(limit=1, best=True, trust_steps=1)
    for loss in (3.0, 1.0, 2.0, 1.5, 1.7):
        run.keeper.evaluated(run.port.state.step + 1, loss)
        run.step(save=True)
    assert 2 in run.standing
    run.keeper.evaluated(6, 0.5)
    run.step(2, save=True)
    assert 2 not in run.standing
    assert 6 in run.standing


def test_a_held_out_loss_that_is_not_finite_is_never_the_best(kept: Callable[..., Kept]) -> None:
    keeper = kept(best=True).keeper
    for loss in (math.nan, math.inf):
        keeper.evaluated(1, loss)
        assert keeper.best is None
    keeper.evaluated(2, 3.0)
    keeper.evaluated(3, math.nan)
    assert keeper.best == (3.0, 2)


def test_the_best_is_the_best_of_those_that_stand(kept: Callable[..., Kept]) -> None:
    """``eval_steps`` and ``save_steps`` need not agree: a low loss at a step without checkpoint keeps nothing."""
    run = kept(limit=1, best=True, trust_steps=1)
    for number, loss in enumerate((3.0, 1.0, 2.0, 0.5, 2.5), 1):
        run.keeper.evaluated(number, loss)
        run.step(save=number != 4)
    run.step(2, save=True)
    assert 2 in run.standing, "1.0 is the lowest loss of any checkpoint"


def test_the_best_of_a_line_that_was_left_counts_no_more(kept: Callable[..., Kept]) -> None:
    run = kept(limit=1, best=True, trust_steps=1)
    for number, loss in enumerate((3.0, 2.0, 2.5, 0.1), 1):
        run.keeper.evaluated(number, loss)
        run.step(save=True)
    run.keeper.abandon_after(3)
    assert run.keeper.best == (2.0, 2)


def test_what_cannot_be_removed_does_not_stop_the_run(
    kept: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = kept(limit=1, trust_steps=1)

    def stuck(_path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(keeper, "remove_folder", stuck)
        run.step(5, save=True)
        assert run.standing == [1, 2, 3, 4, 5]
    run.step(save=True)
    assert run.standing == [5, 6], "tried again at the next rotation"


# ---------------------------------------------------------------- trust


@pytest.mark.parametrize("trust_steps", [1, 7])
def test_a_candidate_is_trusted_after_so_many_clean_steps_and_not_one_before(
    kept: Callable[..., Kept], trust_steps: int
) -> None:
    run = kept(trust_steps=trust_steps)
    run.step(10)
    run.step(save=True)
    for _ in range(trust_steps - 1):
        run.step()
        assert run.trusted == []
    run.step()
    assert run.trusted == [11]
    assert [(r["step"], r["path"]) for r in run.records("trusted")] == [(11 + trust_steps, "checkpoint-11")]


def test_an_unclean_step_starts_the_count_anew(kept: Callable[..., Kept]) -> None:
    run = kept(trust_steps=5)
    run.step(save=True)
    run.step(4)
    run.step(clean=False)
    run.step(4)
    assert run.trusted == []
    run.step()
    assert run.trusted == [1]


def test_clean_steps_before_the_save_do_not_count(kept: Callable[..., Kept]) -> None:
    run = kept(trust_steps=5)
    run.step(100)
    run.step(save=True)
    run.step(4)
    assert run.trusted == []


def test_a_batch_that_was_given_up_is_no_clean_step(kept: Callable[..., Kept]) -> None:
    run = kept(trust_steps=3)
    run.step(save=True)
    run.step(2)
    run.port.settle(Action.SKIP_BATCH, Reading(4, math.nan, math.nan), clean=False)
    run.keeper.after_step(run.port.state.step)
    run.step(2)
    assert run.trusted == []
    run.step()
    assert run.trusted == [1]


@pytest.mark.parametrize("unclean_at", [None, 26])
def test_a_resume_in_between_neither_loses_nor_shortens_the_count(
    kept: Callable[..., Kept], unclean_at: int | None
) -> None:
    """Saves at 10, 20, 30, killed at 33, resumed from 30; 25 clean steps are needed."""
    run = kept(limit=9, trust_steps=25)
    for number in range(1, 34):
        run.step(clean=number != unclean_at, every=10)
    run.port = small_port()
    run.port.state.load(json.loads((run.folder / "checkpoint-30" / "state.json").read_text()))
    run.keeper = run.make(run.folder / "checkpoint-30", limit=9, trust_steps=25, background=False)
    run.keeper.recall()
    seen = {}
    for _ in range(40):
        run.step()
        seen.update({s: run.port.state.step for s in run.trusted if s not in seen})
    first = 35 if unclean_at is None else unclean_at + 25
    assert seen == {10: first, 20: max(first, 45), 30: 55}


def test_several_candidates_may_become_trusted_at_once(kept: Callable[..., Kept]) -> None:
    run = kept(limit=9, trust_steps=4)
    run.step(3, save=True)
    run.step(clean=False)
    run.step(4)
    assert run.trusted == [1, 2, 3]


def test_a_refused_mark_is_said_and_tried_again_later(
    kept: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = kept(trust_steps=2)
    run.step(save=True)

    def full(*_args: object) -> None:
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_atomic", full)
        run.step(10)
        assert [f.code for f in run.findings] == ["SYS001"], "said once, not at every step"
        assert run.trusted == []
    run.step(40)
    assert run.trusted == [1]


def spoil(folder: Path) -> None:
    path = folder / "state.json"
    path.write_text(path.read_text().replace("1", "7", 1))


def test_a_damaged_candidate_is_never_trusted(kept: Callable[..., Kept]) -> None:
    """DESIGN 8, invariant 2: no trusted checkpoint is torn. It would push the last good one out."""
    run = kept(limit=1, trust_steps=3)
    run.step(save=True)
    run.step(3)
    assert run.trusted == [1]
    run.step(save=True)
    spoil(run.folder / "checkpoint-5")
    assert checkpoint.faults_of(run.folder / "checkpoint-5")
    run.step(3)
    run.step(save=True)
    assert run.trusted == [1], "the damaged one was trusted, and the good one removed for it"


BROKEN: dict[str, Callable[[Path], Any]] = {
    "its manifest is gone": lambda folder: (folder / "manifest.json").unlink(),
    "it is gone": shutil.rmtree,
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_candidate_that_can_never_be_trusted_holds_nothing_up_and_is_said_once(
    kept: Callable[..., Kept], how: str
) -> None:
    """The place of the oldest candidate must go to one that can be trusted."""
    run = kept(limit=2, trust_steps=10)
    run.step(2, save=True)
    BROKEN[how](run.folder / "checkpoint-1")
    run.step(100, every=3)
    assert run.trusted
    assert run.trusted[-1] >= 102 - 2 * 10 - 2 * 3, "no older than twice the delay, and two saves"
    assert len(run.findings) <= 1


def test_in_the_background_candidates_are_trusted_as_well(kept: Callable[..., Kept]) -> None:
    run = kept(background=True, trust_steps=5)
    run.step(save=True)
    run.keeper.settle(wait=True)
    run.step(5)
    run.keeper.settle(wait=True)
    assert run.trusted == [1]
    assert [r["path"] for r in run.records("trusted")] == ["checkpoint-1"]


def test_a_candidate_that_is_rotated_away_while_it_is_looked_at_is_not_called_damaged(
    kept: Callable[..., Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an unclean step several become ripe at once; the newest of them makes the others dispensable."""
    run = kept(background=True, limit=1, trust_steps=4)
    for _ in range(3):
        run.step(save=True)
        run.keeper.settle(wait=True)
    assert run.standing == [1, 3]
    run.step(clean=False)
    newest_is_in, look = threading.Event(), keeper.look_and_trust

    def slow(path: Path, step: int) -> Path:
        assert step_in(path) == 3 or newest_is_in.wait(20)
        return look(path, step)

    monkeypatch.setattr(keeper, "look_and_trust", slow)
    run.step(4)
    deadline = time.monotonic() + 20
    while not run.records("trusted") and time.monotonic() < deadline:
        run.keeper.settle()
    newest_is_in.set()
    run.keeper.settle(wait=True)
    assert 3 in run.trusted
    assert run.codes == []
