"""Every fault: a family drawn from a seed, planted the same way twice, that does harm and knows its right answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finitune.bench.cases import Case
from finitune.bench.harness import fresh, planted
from finitune.bench.workload import Expected
from finitune.core import registry
from finitune.core.codes import all_codes

NAMES = registry.names("faults")
LIGHT = tuple(n for n in NAMES if not getattr(registry.load("faults", n), "HEAVY", False))
CODES = set(all_codes())
KINDS = {"module", "op", "parameter", "moment", "buffer", "row", "tokens", "step", "rank"}
REMEDIES = {*registry.names("remedies"), "none", "halt"}

TABLE = {
    "recipe_long_rows": "A",
    "recipe_template": "A",
    "recipe_untargeted_rows": "A",
    "unlabelled_batch": "A",
    "unlabelled_micro": "A",
    "unlabelled_unseen": "A",
    "growing_residual": "B",
    "grown_mlp": "B",
    "huge_weight": "B",
    "loud_token": "B",
    "real_loud_token": "B",
    "recipe_grown_mlp": "B",
    "recipe_huge_weight": "B",
    "backward_overflow": "C",
    "scaler_from_extreme": "C",
    "half_lora": "D",
    "half_parameters": "D",
    "blind_row": "E",
    "mask_added_twice": "E",
    "nan_pad_embedding": "E",
    "bad_kernel": "F",
    "broken_backward": "F",
    "nan_backward": "F",
    "real_nan_backward": "F",
    "not_reproducible": "G",
    "dead_head": "H",
    "inf_token": "H",
    "nan_base_weight": "H",
    "recipe_dead_head": "H",
    "recipe_missing_key": "H",
    "recipe_wrong_rope": "H",
    "uninitialised_head": "H",
    "zeroed_inv_freq": "H",
    "rate_jump": "I",
    "rate_jump_sgd": "I",
    "rate_ramp": "I",
    "real_rate_jump": "I",
    "lost_updates": "J",
    "div_by_count": "K",
    "exp_under_mask": "K",
    "log1p_of_one": "K",
    "lone_generation": "K",
    "pole_in_loss": "K",
    "accumulation_not_divided": "L",
    "mean_of_means": "L",
    "no_gradient": "M",
    "huge_pixel": "N",
    "inf_row_weight": "N",
    "nan_pixels": "N",
    "nan_reward": "N",
    "nan_row": "N",
    "rank_nan_row": "N",
    "real_nan_row": "N",
    "recipe_broken_rows": "N",
    "recipe_copied_rows": "N",
    "two_bad_rows": "N",
    "hot_rows": "O",
    "id_out_of_range": "O",
    "eos_masked": "P",
    "recipe_no_stop": "P",
    "hot_router": "Q",
    "inf_expert": "Q",
    "nan_gate": "Q",
    "wrong_map": "R",
    "wrong_sign": "R",
    "wrong_device_autocast": "S",
    "flipped_bit": "T",
    "huge_weight_later": "T",
    "nan_buffer": "T",
    "nan_moment": "T",
    "nan_weight_later": "T",
    "negative_second_moment": "T",
    "rank_flipped_bit": "T",
    "real_flipped_bit": "T",
    "real_nan_moment": "T",
    "recipe_nan_weight": "T",
    "recipe_edited_checkpoint": "U",
    "hidden_nan": "V",
    "saturated_attention": "W",
    "zero_row_norm": "W",
    "for_ever": "X",
}
"""Fault -> class of the taxonomy."""


def test_the_faults_and_their_classes() -> None:
    assert {name: registry.load("faults", name).FAULT_CLASS for name in NAMES} == TABLE


@pytest.mark.parametrize("name", NAMES)
def test_a_fault_names_a_class_and_runs_that_there_are(name: str) -> None:
    fault = registry.load("faults", name)
    assert len(fault.FAULT_CLASS) == 1
    assert fault.FAULT_CLASS.isupper()
    for run, precision in fault.RUNS:
        assert precision in registry.load("runs", run).PRECISIONS, (run, precision)


def answers(name: str, seed: int) -> Expected:
    _, expected = planted(Case("faults", name, seed))
    return expected


@pytest.mark.parametrize("name", LIGHT)
def test_the_right_answers_are_answers_that_can_be_given(name: str) -> None:
    for seed in range(len(registry.load("faults", name).RUNS)):
        expected = answers(name, seed)
        assert expected.says
        assert set(expected.codes) <= {*CODES, "unknown"}, expected.codes
        assert {kind for kind, _ in expected.places} <= KINDS
        assert set(expected.remedies) <= REMEDIES
        assert expected.reference in ("clean", "fp32", "")
        assert not any(code.startswith(expected.never) for code in expected.codes if expected.never) or expected.codes


@pytest.mark.parametrize("name", LIGHT)
def test_a_fault_is_drawn_from_its_seed_and_from_nothing_else(name: str) -> None:
    first, again = answers(name, 1), answers(name, 1)
    assert first == again
    others = {answers(name, seed).says for seed in range(1, 9)}
    assert len(others) > 1, others


@pytest.mark.parametrize("name", LIGHT)
def test_a_fault_changes_nothing_of_the_data_order(name: str) -> None:
    """Rows keep their names and order, so that the clean run sees the same."""
    case = Case("faults", name, 2)
    workload, _ = planted(case)
    rows: Any = getattr(workload, "rows", None)
    if rows is not None and hasattr(workload, "batches"):
        assert rows == fresh(case).rows


@pytest.mark.parametrize("name", LIGHT)
def test_planting_leaves_the_global_generator_alone(name: str) -> None:
    case = Case("faults", name, 0)
    fresh(case)
    state = torch.random.get_rng_state()
    planted(case)
    assert torch.equal(torch.random.get_rng_state(), state)
