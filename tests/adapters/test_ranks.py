"""The guard on two real processes over gloo: one verdict, one incident, one cure, and nobody waits for ever.

Every scene of ``ranks_script.py`` is run once on two processes; the tests look at what both of them told.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from finitune.core.errors import UserError

SCRIPT = Path(__file__).with_name("ranks_script.py")
pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
WAIT_S = 150
Pair = list[dict[str, Any]]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Pair]:
    """What both ranks told of each scene."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(rank), str(folder)], env=environment) for rank in range(2)
    ]
    try:
        for process in ranks:
            assert process.wait(WAIT_S) == 0
    finally:
        for process in ranks:
            process.kill()
    names = {path.name.split(".")[0] for path in folder.glob("*.json")}
    return {n: [json.loads((folder / f"{n}.{rank}.json").read_text()) for rank in range(2)] for n in names}


def pair(scenes: Mapping[str, Pair], name: str) -> Pair:
    """Of one scene; what both ranks must agree upon is the same."""
    both = scenes[name]
    assert [one.get("traceback") for one in both] == [None, None]
    for key in ("committed", "actions", "cures", "step", "attempt", "snapshots"):
        assert both[0].get(key) == both[1].get(key), key
    assert repr(both[0].get("losses")) == repr(both[1].get("losses"))
    told = [[i["diagnosis"] for i in one.get("incidents", [])] for one in both]
    assert repr(told[0]) == repr(told[1])
    return both


def replicas(both: Pair) -> bool:
    """Both ranks hold the same finite weights and moments."""
    return both[0]["sums"] == both[1]["sums"] and both[0]["finite"]


def suspects(both: Pair, number: int = 0) -> list[tuple[str, str]]:
    return [(s["kind"], s["name"].split(":")[0]) for s in both[1]["incidents"][number]["suspects"]]


def cause(both: Pair, number: int = 0) -> Any:
    return both[0]["incidents"][number]["diagnosis"][0]["code"]


def test_a_healthy_run_has_the_bits_of_the_plain_one_on_every_rank(scenes: Mapping[str, Pair]) -> None:
    both = pair(scenes, "healthy")
    for one in both:
        assert one["sums"] == one["plain"]
        assert one["same_draws"]
        assert all(one["committed"])
        assert not one["incidents"]
        assert not one["findings"]


def test_a_bad_row_of_one_rank_is_named_with_its_rank_and_left_out_on_both(scenes: Mapping[str, Pair]) -> None:
    both = pair(scenes, "nan_row")
    assert cause(both) == "DAT401"
    assert {("row", "rank1.row22"), ("rank", "1")} <= set(suspects(both))
    assert [i["outcome"] for i in both[0]["incidents"]] == ["cured"]
    assert all(both[0]["committed"])
    assert replicas(both)


def test_one_rank_alone_cannot_guard_a_model_that_exchanges_gradients(scenes: Mapping[str, Pair]) -> None:
    assert all("SYS425" in one["alone"] for one in scenes["healthy"])


def test_bad_rows_of_both_ranks_are_both_found(scenes: Mapping[str, Pair]) -> None:
    both = pair(scenes, "nan_rows_on_both")
    assert [cause(both, n) for n in range(2)] == ["DAT401", "DAT401"]
    assert ("row", "rank0.row21") in suspects(both, 0)
    assert ("row", "rank1.row22") in suspects(both, 1)
    assert all(both[0]["committed"])
    assert replicas(both)


def test_a_rank_with_nothing_left_still_takes_part(scenes: Mapping[str, Pair]) -> None:
    both = pair(scenes, "lone_row")
    assert ("row", "rank1.row11") in suspects(both)
    assert all(both[0]["committed"])
    assert replicas(both)


def test_a_weight_that_one_rank_alone_has_wrong_is_repaired(scenes: Mapping[str, Pair]) -> None:
    both = pair(scenes, "nan_weight")
    assert cause(both) == "SYS403"
    assert {("parameter", "first.weight"), ("rank", "1")} <= set(suspects(both))
    assert "DST413" in both[0]["findings"]
    assert all(both[0]["committed"])
    assert replicas(both)


def test_an_update_that_one_rank_spoils_is_undone_on_all(scenes: Mapping[str, Pair]) -> None:
    both = pair(scenes, "nan_moment")
    assert cause(both) == "SYS403"
    assert {("moment", "first.weight|exp_avg"), ("rank", "1")} <= set(suspects(both))
    assert both[0]["sums"] == scenes["healthy"][0]["plain"]
    assert replicas(both)


def test_all_ranks_go_back_together(scenes: Mapping[str, Pair]) -> None:
    both = pair(scenes, "rate_jump")
    assert both[0]["incidents"][0]["steps_lost"] > 0
    assert cause(both) == "OPT401"
    assert replicas(both)


def test_replicas_that_differ_in_a_low_bit_are_found_and_made_the_same(scenes: Mapping[str, Pair]) -> None:
    both = pair(scenes, "flipped_low_bit")
    assert both[0]["findings"] == both[1]["findings"] == ["DST413"]
    assert not both[0]["incidents"]
    assert replicas(both)


def test_an_overflow_of_one_rank_is_none_of_the_exchange(scenes: Mapping[str, Pair]) -> None:
    both = pair(scenes, "overflow")
    assert cause(both) == "NUM400"
    assert {("module", "first"), ("rank", "1")} <= set(suspects(both))
    assert all(both[0]["committed"])
    assert replicas(both)


def test_a_gradient_that_is_bad_on_one_rank_before_the_exchange_is_named_there(scenes: Mapping[str, Pair]) -> None:
    both = pair(scenes, "bad_backward")
    assert {("row", "rank1.row22"), ("rank", "1")} <= set(suspects(both))
    assert all(both[0]["committed"])
    assert replicas(both)


def test_what_one_rank_raises_ends_the_step_of_all(scenes: Mapping[str, Pair]) -> None:
    both = pair(scenes, "raising")
    assert [kind for kind, _ in both[1]["errors"]] == ["KeyError", "RuntimeError", "ZeroDivisionError"]
    assert all("DST410 rank 1: " in text for _, text in both[0]["errors"])
    assert all(both[0]["committed"])
    assert both[0]["step"] == 9
    assert replicas(both)


def test_fewer_micro_batches_on_one_rank_are_no_reason_to_wait(scenes: Mapping[str, Pair]) -> None:
    both = pair(scenes, "uneven")
    assert all(both[0]["committed"])
    assert replicas(both)


def test_ranks_that_exchange_nothing_are_told_and_only_refuse_together(scenes: Mapping[str, Pair]) -> None:
    both = pair(scenes, "not_wrapped")
    assert both[0]["findings"] == both[1]["findings"] == ["DST412"]
    assert both[0]["committed"] == [True, True, True, False, True, True]
    assert not both[0]["incidents"]
    assert both[0]["sums"] != both[1]["sums"]


def test_observe_finds_the_row_and_changes_nothing(scenes: Mapping[str, Pair]) -> None:
    both = pair(scenes, "observed")
    assert cause(both) == "DAT401"
    assert both[0]["cures"] == {}
    assert both[0]["committed"].count(False) == 1
    assert replicas(both)


def test_all_ranks_halt_with_the_same_words(scenes: Mapping[str, Pair]) -> None:
    both = pair(scenes, "halting")
    assert both[0]["error"] == both[1]["error"]
    assert both[0]["error"][0] == "Halted"


def test_the_records_of_the_ranks_tell_the_same_line(scenes: Mapping[str, Pair]) -> None:
    both = pair(scenes, "journalled")
    assert both[0]["kinds"] == both[1]["kinds"]
    assert both[0]["folders"] == ["incidents", "journal.jsonl", "rank_1"]


def test_a_run_goes_on_from_what_each_rank_saved(scenes: Mapping[str, Pair]) -> None:
    both = pair(scenes, "resumed")
    assert both[0]["sums"] == both[0]["whole"]
    assert replicas(both)


def test_sharded_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import nn

    from finitune.adapters import ranks

    class DTensor:
        pass

    class Sharded(nn.Module):
        def named_parameters(self, *_: Any, **__: Any) -> Any:
            yield "weight", type("P", (), {"data": DTensor()})()

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda _group=None: 2)
    with pytest.raises(UserError, match="DST414"):
        ranks.ranks_of(Sharded(), None)


@pytest.mark.parametrize("wanted", [True, "all", 2])
def test_ranks_that_are_not_there_are_refused_by_name(wanted: Any) -> None:
    from torch import nn, optim

    import finitune

    model = nn.Linear(2, 1)
    with pytest.raises(UserError, match="SYS425"):
        finitune.guard(model, optim.SGD(model.parameters(), 0.1), lambda m, b: m(b).mean(), ranks=wanted)
