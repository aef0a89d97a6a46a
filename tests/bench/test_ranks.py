"""The run on two ranks: a step is one micro-batch each, and the plain loop on one process learns the same."""

from __future__ import annotations

import pytest
import torch

from finitune.bench.cases import Case
from finitune.bench.contenders import _ranks
from finitune.bench.harness import run_case
from finitune.bench.loops import Script
from finitune.bench.runs import gloo_sft
from finitune.bench.witness import Witness


def test_every_rank_gets_its_own_rows_and_all_are_given() -> None:
    whole = gloo_sft.build(3, "fp32", 4)
    parts = [gloo_sft.build(3, "fp32", 4) for _ in range(gloo_sft.NUM_RANKS)]
    for rank, load in enumerate(parts):
        _ranks.of_rank(load, rank)
    for step in range(4):
        assert [name for load in parts for name in load.rows[step]] == whole.rows[step]
        for rank, load in enumerate(parts):
            assert torch.equal(load.batches[step]["input_ids"], whole.batches[step][rank]["input_ids"])
            assert len(load.rows[step]) == len(load.batches[step]["input_ids"])


def test_the_run_learns_on_one_process_too() -> None:
    load = gloo_sft.build(3, "fp32", gloo_sft.STEPS)
    before = load.held_out_loss()
    witness = Witness(load)
    Script(load, witness).run()
    assert not witness.error
    assert load.held_out_loss() < before


@pytest.mark.timeout(120)
def test_two_processes_train_a_faulty_case_to_its_end() -> None:
    record = run_case(Case("faults", "rank_nan_row", 4))
    assert record["error"] == ""
    assert record["poisoned_steps"] == 0
    assert (record["place"], record["cause"], record["remedy"]) == (True, "right", True)


def test_a_contender_that_cannot_drive_ranks_is_left_out_with_a_reason() -> None:
    assert "ranks" in run_case(Case("faults", "rank_nan_row", 4, "clip_and_skip"))["skipped"]
