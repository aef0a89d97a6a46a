"""Every contender on the same small fault: driven, or left out with a reason; a clean run is a run."""

from __future__ import annotations

import math

import pytest

from finitune.bench.cases import Case
from finitune.bench.harness import driven, final_loss, fresh, run_case
from finitune.core import registry

NAMES = registry.names("contenders")


@pytest.mark.parametrize("name", NAMES)
def test_a_contender_says_what_it_is_meant_for(name: str) -> None:
    contender = registry.load("contenders", name)
    assert contender.MEANT_FOR
    reason = contender.missing()
    assert reason is None or reason


def there(name: str) -> None:
    reason = registry.load("contenders", name).missing()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("name", NAMES)
def test_a_contender_gives_a_whole_record_of_a_faulty_run(name: str) -> None:
    there(name)
    record = run_case(Case("faults", "nan_row", 0, name))
    assert record["contender"] == name
    assert isinstance(record["detected"], bool)
    assert record["checkpoints"] > 0
    assert math.isfinite(record["clean_loss"])


@pytest.mark.parametrize("name", [n for n in NAMES if n != "arc_training"])
def test_a_contender_trains_a_healthy_run_to_its_end(name: str) -> None:
    there(name)
    case = Case("controls", "plain_fp32", 0, name, quick=True)
    workload = fresh(case)
    before = workload.held_out_loss()
    witness = driven(case, workload)
    assert not witness.error
    assert not witness.poisoned
    assert len(witness.losses) == len(workload.batches)
    assert final_loss(workload) < before


def test_known_contenders_are_there() -> None:
    assert {
        "finitune",
        "plain",
        "clip_and_skip",
        "grad_scaler",
        "hf_trainer",
        "detect_anomaly",
        "debug_underflow_overflow",
        "lightning_trainer",
        "stabilityguard",
        "sherlorch",
        "arc_training",
        "pytorch_optimizer_agc",
    } <= set(NAMES)


def test_without_a_guard_the_model_dies_and_with_one_it_does_not() -> None:
    plain = run_case(Case("faults", "nan_row", 0, "plain"))
    ours = run_case(Case("faults", "nan_row", 0, "finitune"))
    assert plain["poisoned_steps"] > 0
    assert plain["final_loss"] is None
    assert ours["poisoned_steps"] == 0
    assert ours["cured"]
