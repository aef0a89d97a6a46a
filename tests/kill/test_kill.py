"""A killed run goes on as if nothing had happened, wherever it was killed and however often."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from itertools import chain
from typing import TYPE_CHECKING

import pytest

from kill import plans
from kill.bench import Bench
from kill.configurations import CONFIGURATIONS
from kill.oracle import checkpoints
from kill.trials import Trial

if TYPE_CHECKING:
    from kill.conftest import Benches, Run

_FEW_MISSED = 0.05
"""Share of places that may not be met again: a background thread is not always at the same place."""


def _trials(benches: Benches, plan: Callable[[Bench], Iterable[Trial]]) -> list[Trial]:
    return list(chain.from_iterable(plan(bench) for bench in benches.of(CONFIGURATIONS)))


@pytest.mark.skipif("FINITUNE_KILL_TRIAL" not in os.environ, reason="no trial is asked for by FINITUNE_KILL_TRIAL")
def test_one_trial(run: Run) -> None:
    run([Trial.parse(os.environ["FINITUNE_KILL_TRIAL"])])


@pytest.mark.parametrize("plan", [plans.deaths_at_places, plans.deaths_while_resuming, plans.chains])
def test_a_run_killed_at_any_place_comes_to_the_same_end(benches: Benches, run: Run, plan) -> None:
    outcomes = run(_trials(benches, plan))
    firsts = [o for o in outcomes if len(o.trial.deaths) == 1]
    assert sum(o.missed for o in firsts) <= max(2, _FEW_MISSED * len(firsts))


def test_a_run_killed_at_a_random_moment_comes_to_the_same_end(benches: Benches, run: Run) -> None:
    outcomes = run(_trials(benches, plans.random_deaths))
    assert any(reply["died"] for o in outcomes for reply in o.replies)


def test_a_run_asked_to_stop_comes_to_the_same_end_and_does_nothing_twice(benches: Benches, run: Run) -> None:
    outcomes = run(_trials(benches, plans.stops))
    assert any(o.replies[0]["status"] == "interrupted" for o in outcomes)


def test_what_a_death_leaves_is_loaded_by_transformers_and_peft(benches: Benches, pool) -> None:
    made, server = benches.of(list(CONFIGURATIONS) if plans.FULL else plans.DAMAGED), pool.servers[0]
    homes = [bench.template(server, name) for bench in made for name in ("early", "late")]
    folders = [str(folder) for home in homes for folder in checkpoints(home / "run")]
    reply = server.ask("load", folders=folders)
    assert reply["status"] == "loaded", reply


def test_the_places_are_where_a_run_can_be_hurt(benches: Benches) -> None:
    """If a hook stops working, the matrix would grow thin without anybody noticing."""
    (bench,) = benches.of(["full fp32"])
    labels = [place.label for place in bench.places]
    for needed in (
        "step before forward_backward",
        "step after backward",
        "step after update",
        "step after commit",
        "step before settle",
        "step after copying tensors",
        "write journal.jsonl:step",
        "write journal.jsonl:save",
        "fsync journal.jsonl",
        "rust .checkpoint-6.*-*.tmp/model.safetensors",
        "rust .checkpoint-6.*-*.tmp/optimizer.safetensors",
        "write .checkpoint-6.*-*.tmp/state.json",
        "fsync .checkpoint-6.*-*.tmp/optimizer.safetensors",
        "rename .checkpoint-6.*-*.tmp to checkpoint-6",
        "rename .final.*-*.tmp to final",
        "rename .recipe.yaml.*-*.tmp to recipe.yaml",
    ):
        assert needed in labels, needed
    assert any(label.startswith("remove ") and "checkpoint-3" in label for label in labels), "no rotation"
    resumed = [place.label for place in bench.resume_places]
    assert "write journal.jsonl:resume" in resumed
