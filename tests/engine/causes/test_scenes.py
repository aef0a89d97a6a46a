"""Each cause names its own scene, look-alikes are told apart by experiment, and nothing else is blamed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.causes.scenes import (
    DOWN,
    FP16,
    FP32,
    OF_CAUSES,
    OF_RECIPES,
    OVERFLOW,
    PURE,
    ROW,
    SPOILT,
    WIDE,
    at,
    bad_before,
    case,
    evidence,
    row_found,
    silent,
)
from finitune.core import registry
from finitune.core.incident import Suspect, Trigger, Verdict
from finitune.core.types import Finding, Severity
from finitune.engine.case import Case
from finitune.engine.diagnose import diagnose


def named(of) -> list[str]:
    return [c.name for c in diagnose(of).causes if c.named]


def suspected(of) -> list[str]:
    return [c.name for c in diagnose(of).causes if not c.named]


@pytest.mark.parametrize("name", OF_CAUSES)
def test_a_cause_is_named_in_its_own_scene(name: str) -> None:
    top = diagnose(OF_CAUSES[name]).top
    assert top is not None
    assert (top.name, top.named) == (name, True)
    assert top.confidence > 0.5


@pytest.mark.parametrize("recipe", OF_RECIPES)
def test_the_recipes_of_the_counterfactual_matrix_are_told_apart(recipe: str) -> None:
    of, expected = OF_RECIPES[recipe]
    assert named(of)[0] == expected


def test_no_flip_is_unknown() -> None:
    """A NaN on a gradient hook: localised, but nothing that was changed made it go away."""
    tried = "fp32 bf16 loss_scales known_good_batch rows math_attention padding lower_lr tighter_clip older_weights"
    of = case(
        Trigger.GRADIENT,
        suspects=at("model.layers.1.self_attn.q_proj", "gradient hook", "backward"),
        evidence=evidence("scan_state supervised_tokens", tried),
    )
    assert diagnose(of).code == "unknown"
    assert named(of) == []


@pytest.mark.parametrize("trigger", Trigger)
def test_no_experiment_names_nothing(trigger: Trigger) -> None:
    """A budget of 0: hints alone name no cause, however many there are."""
    assert named(case(trigger, FP16, suspects=OVERFLOW, supervised_tokens=40)) == []


# ---- range, row, or both ----


def test_a_token_that_triggers_an_overflow_is_an_overflow_with_its_row_and_not_a_bad_row() -> None:
    of = case(
        facts=FP16,
        suspects=(*OVERFLOW, Suspect("tokens", ROW, {"span": [5, 6]})),
        evidence=evidence("scan_state fp32 bf16 rows known_good_batch", "", rows=row_found()),
    )
    top = diagnose(of).top
    assert top is not None
    assert (top.name, top.where, top.data["rows"]) == ("forward_overflow", DOWN, ROW)
    assert "5" in str(top.data["tokens"])
    assert "bad_row" not in named(of)


def test_a_row_that_fails_in_fp32_too_is_a_bad_row_and_not_an_overflow() -> None:
    of = case(facts=FP16, evidence=evidence("scan_state rows known_good_batch", "fp32 bf16", rows=row_found()))
    assert named(of) == ["bad_row"]
    assert "forward_overflow" not in suspected(of)


def test_an_overflow_names_the_value_beyond_the_range() -> None:
    top = diagnose(OF_CAUSES["forward_overflow"]).top
    assert top is not None
    assert (top.data["amax"], top.data["limit"], top.data["cured_by"]) == (65822.0, 65504.0, "bf16")


def test_a_weight_beyond_the_range_is_named_itself() -> None:
    heavy = Suspect("parameter", "lm_head.weight", {"amax": 70000.0, "what": "weight"})
    of = case(facts=FP16, suspects=(heavy, *OVERFLOW), evidence=evidence("scan_state fp32"))
    top = diagnose(of).top
    assert top is not None
    assert (top.name, top.where) == ("forward_overflow", "lm_head.weight")


def test_an_overflow_of_attention_scores_is_no_masked_row() -> None:
    of = case(
        facts=FP16,
        suspects=at("model.layers.0.self_attn", "aten.bmm.default", dtype="float16"),
        evidence=evidence("scan_state fp32 bf16", "known_good_batch rows padding"),
    )
    assert named(of) == ["forward_overflow"]


def test_a_mask_that_is_added_twice_is_no_overflow_of_activations() -> None:
    of = case(
        facts=FP16,
        suspects=at("model.layers.0.self_attn", "aten._softmax.default", dtype="float16"),
        evidence=evidence("scan_state fp32 bf16 rows padding known_good_batch", "", rows=row_found()),
    )
    assert named(of)[0] == "masked_row"


# ---- the backward pass ----


def test_a_gradient_that_is_nan_at_every_scale_is_no_matter_of_the_scale() -> None:
    of = case(
        Trigger.SCALE,
        FP16,
        loss_scale=1.0,
        suspects=at("(loss)", "SqrtBackward0", "backward"),
        evidence=evidence("scan_state rows known_good_batch", "fp32 bf16 loss_scales", rows=row_found()),
    )
    assert named(of)[0] == "loss_math"
    assert "backward_overflow" not in named(of)


def test_failing_at_every_scale_makes_a_suspected_overflow_of_the_gradients_unlikely() -> None:
    before = registry.load("causes", "backward_overflow").weigh(case(Trigger.SCALE, FP16))
    after = registry.load("causes", "backward_overflow").weigh(
        case(Trigger.SCALE, FP16, evidence=evidence("", "loss_scales"))
    )
    assert after.confidence < before.confidence / 3


def test_a_nan_loss_under_a_scaler_is_never_a_backward_overflow() -> None:
    of = case(Trigger.LOSS, FP16, loss_scale=1.0, suspects=OVERFLOW, evidence=evidence("fp32 loss_scales"))
    assert "backward_overflow" not in [c.name for c in diagnose(of).causes]


def test_a_backward_only_fault_is_no_forward_overflow() -> None:
    of = OF_CAUSES["attention_kernel"]
    assert "forward_overflow" not in [c.name for c in diagnose(replace(of, facts=FP16)).causes]


def test_a_kernel_of_ones_own_that_fails_at_certain_lengths_is_an_attention_kernel() -> None:
    of = case(
        Trigger.GRADIENT,
        suspects=at("model.layers.0.self_attn", "MyFlashBackward", "backward"),
        evidence=evidence(
            "scan_state padding", "fp32 rows known_good_batch", padding={"widths_good": [1], "widths_bad": [8]}
        ),
    )
    assert named(of) == ["attention_kernel"]


def test_a_router_is_told_from_a_gate_proj() -> None:
    assert "router" not in [c.name for c in diagnose(case(facts=FP16, suspects=at("m.mlp.gate_proj", "mm"))).causes]
    assert "router" in [c.name for c in diagnose(case(facts=FP16, suspects=at("m.mlp.gate", "mm"))).causes]


# ---- state and update ----


def test_a_frozen_weight_that_other_batches_took_well_before_was_corrupted() -> None:
    frozen = bad_before("parameter", "base.weight", None, frozen=True, since_exact=False)
    went_bad = case(suspects=(frozen,), evidence=evidence("", "scan_state known_good_batch older_weights"))
    assert named(went_bad) == ["corrupt_state"]
    dormant = case(suspects=(frozen,), evidence=evidence("known_good_batch", "scan_state older_weights"))
    assert named(dormant) == ["bad_weights"]
    at_once = case(step=1, suspects=(frozen,), evidence=evidence("", "scan_state known_good_batch"))
    assert named(at_once) == ["bad_weights"]


def test_a_bad_moment_was_corrupted() -> None:
    moment = bad_before("moment", "w|exp_avg", 41)
    of = case(Trigger.UPDATE, suspects=(moment, SPOILT), evidence=evidence("fresh_moments", "scan_state"))
    top = diagnose(of).top
    assert top is not None
    assert (top.name, top.where, top.data["since_step"]) == ("corrupt_state", "w|exp_avg", 41)


def test_what_the_update_just_made_bad_is_no_bad_state_of_before() -> None:
    of = case(Trigger.UPDATE, PURE, suspects=(SPOILT,), evidence=evidence("adam_eps", "scan_state"))
    assert "corrupt_state" not in named(of)
    assert "bad_weights" not in named(of)


def test_an_update_that_a_larger_eps_cures_blames_neither_the_rate_nor_the_optimizer() -> None:
    of = case(
        Trigger.UPDATE,
        PURE,
        suspects=(SPOILT,),
        evidence=evidence("adam_eps fp32 lower_lr reference_optimizer", **WIDE),
    )
    assert named(of) == ["half_optimizer"]


def test_a_failed_replay_of_fresh_moments_soon_after_a_resume_is_a_matter_of_the_resume() -> None:
    later = replace(OF_CAUSES["resume_state"], facts={**FP32, "resumed_step": 3})
    assert named(later)[0] == "corrupt_state"


# ---- the learning rate ----


@pytest.mark.parametrize("name", [n for n in OF_CAUSES if n != "learning_rate"])
def test_the_rate_is_blamed_nowhere_else(name: str) -> None:
    assert "learning_rate" not in [c.name for c in diagnose(OF_CAUSES[name]).causes]


def test_the_rate_is_outweighed_where_fp32_cures_half() -> None:
    of, _ = OF_RECIPES["A, half the rate puts it off"]
    assert "learning_rate" not in named(of)


def test_where_clipping_holds_at_the_same_rate_the_rate_comes_second() -> None:
    of = case(Trigger.GRADIENT, evidence=evidence("scan_state tighter_clip lower_lr", "fp32 known_good_batch", **WIDE))
    assert named(of) == ["exploding_gradient", "learning_rate"]


# ---- what does not repeat, and what is not there ----


@pytest.mark.parametrize("name", OF_CAUSES)
def test_what_does_not_repeat_blames_neither_data_nor_rate(name: str) -> None:
    """Whatever else is at hand. What an undone update is replayed on is a state computed anew: the old was wrong."""
    of = replace(OF_CAUSES[name], verdict=Verdict.NOT_REPRODUCED)
    causes = [(c.name, c.named) for c in diagnose(of).causes]
    undone = [("corrupt_state", True), ("not_reproducible", False)]
    assert causes == (undone if of.trigger is Trigger.UPDATE else [("not_reproducible", True)])


def test_what_an_undone_update_held_is_told() -> None:
    held = {"what": "undone", "index": [3, 1], "value": 1e30, "was": 0.02}
    of = case(Trigger.UPDATE, verdict=Verdict.NOT_REPRODUCED, suspects=(Suspect("parameter", "layers.1.w", held),))
    top = diagnose(of).top
    assert top is not None
    assert (top.code, top.where) == ("SYS403", "layers.1.w")
    assert (top.data["index"], top.data["value"], top.data["was"]) == ([3, 1], 1e30, 0.02)


# ---- a state that was changed from outside, and updates that are wrong ----


COMPUTED_AGAIN = [
    name
    for name, of in OF_CAUSES.items()
    if name not in ("nothing_supervised", "not_reproducible") and of.trigger not in (Trigger.FORECAST, Trigger.SILENT)
]


@pytest.mark.parametrize("name", COMPUTED_AGAIN)
def test_a_state_that_was_changed_from_outside_is_nobody_elses_fault(name: str) -> None:
    """What such a state makes of a step says nothing about the step."""
    changed = Suspect("moment", "w|exp_avg", {"what": "changed", "index": [2], "value": 1e7, "was": 1e-7})
    of = OF_CAUSES[name]
    of = replace(of, evidence={**of.evidence, **evidence("redone_state")}, suspects=(*of.suspects, changed))
    of = replace(of, evidence={k: v for k, v in of.evidence.items() if k not in ("scan_state", "reference_optimizer")})
    found = diagnose(of).causes
    assert [c.name for c in found] == ["corrupt_state"]
    if not [s for s in of.suspects if s.data.get("since_step")]:
        assert (found[0].named, found[0].where) == (not of.has_half_weights, "w|exp_avg")


@pytest.mark.parametrize("trigger", [Trigger.LOSS, Trigger.GRADIENT, Trigger.RUNAWAY, Trigger.OUTLIER, Trigger.UPDATE])
def test_wrong_updates_are_the_optimizers_and_not_the_moments(trigger: Trigger) -> None:
    differs = {"max_rel_difference": 2.0, "parameter": "w"}
    of = case(trigger, evidence=evidence("reference_optimizer fresh_moments", "", reference_optimizer=differs))
    assert named(of)[0] == "optimizer_bug"
    assert "corrupt_state" not in [c.name for c in diagnose(of).causes]


# ---- loud rows of the vocabulary ----


LOUD = Suspect("parameter", "embed_tokens.weight", {"what": "row_norm", "row": 64, "rows": [64, 65], "amax": 20.0})


def loud(**fp32: float) -> Case:
    found = evidence("scan_state vocabulary_rows fp32", "", vocabulary_rows={"guessing": 5.8, "tokens": [64, 65]})
    found["fp32"] = replace(found["fp32"], numbers=fp32)
    return case(facts=FP16, suspects=(*OVERFLOW, LOUD), evidence=found)


def test_rows_out_of_scale_are_named_with_their_tokens_where_fp32_is_loud_too() -> None:
    top = diagnose(loud(loss=141.0)).top
    assert top is not None
    assert (top.name, top.named) == ("vocabulary", True)
    assert top.data["tokens"] == "64, 65"


def test_rows_that_fp32_can_work_with_are_a_matter_of_range() -> None:
    assert named(loud(loss=5.9)) == ["forward_overflow"]


@pytest.mark.parametrize("trigger", [Trigger.RUNAWAY, Trigger.OUTLIER])
def test_a_loud_start_is_the_rows(trigger: Trigger) -> None:
    of = case(trigger, suspects=(LOUD,), evidence=evidence("scan_state vocabulary_rows"))
    assert named(of)[0] == "vocabulary"


@pytest.mark.parametrize("verdict", [None, Verdict.REPRODUCED, Verdict.NOT_REPLAYABLE])
def test_not_reproducible_rests_on_the_verdict_alone(verdict: Verdict | None) -> None:
    of = replace(OF_CAUSES["not_reproducible"], verdict=verdict)
    assert "not_reproducible" not in [c.name for c in diagnose(of).causes]


def test_a_rare_sample_that_harms_is_not_harmless() -> None:
    of = OF_CAUSES["harmless_outlier"]
    harmful = replace(of, evidence=of.evidence | evidence("", "let_pass"))
    assert named(harmful) == ["bad_row"]


def test_nothing_supervised_is_counted_not_guessed() -> None:
    of = case(grad_norm=0.0, supervised_tokens=40, evidence=evidence("supervised_tokens scan_state"))
    assert "nothing_supervised" not in named(of)


def test_a_check_names_what_it_found_and_no_other() -> None:
    assert named(silent("OPT403")) == ["loss_normalisation"]
    assert named(silent("OPT405")) == ["resume_state"]
    assert named(case(Trigger.SILENT, finding=Finding("OPT001", Severity.WARNING))) == []


def test_weights_that_move_have_not_lost_their_updates() -> None:
    of = OF_CAUSES["lost_updates"]
    moving = replace(of, reading=replace(of.reading, changed_fraction=0.9))
    assert "lost_updates" not in named(moving)


def test_a_gradient_of_zero_over_nothing_is_no_cut_path() -> None:
    of = case(Trigger.SILENT, grad_norm=0.0, supervised_tokens=0)
    assert "no_gradient" not in [c.name for c in diagnose(of).causes]
