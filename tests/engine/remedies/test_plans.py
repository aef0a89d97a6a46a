"""Plans: what the evidence asks for, mildest first, never looser than what is in force, one rung on after a relapse."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.causes.scenes import (
    COURSE,
    DOWN,
    FP16,
    FP32,
    OF_CAUSES,
    PURE,
    ROW,
    SPOILT,
    WIDE,
    bad_before,
    case,
    evidence,
    row_found,
)
from engine.test_diagnose import cases
from finitune.core import registry
from finitune.core.incident import Cause, Diagnosis, Safety, Trigger, Verdict
from finitune.core.types import Finding, Severity
from finitune.engine.case import Case
from finitune.engine.conditions import AS_CONFIGURED, Conditions
from finitune.engine.diagnose import diagnose
from finitune.engine.plan import BatchFate, Operation, Plan
from finitune.engine.remedying import asked, candidates, loosens

NOW = AS_CONFIGURED
TIGHT = Conditions(
    precision="bf16",
    fp32_modules=("a",),
    lr_factor=0.1,
    max_grad_norm=0.25,
    adam_eps=1e-3,
    quarantine=("ffff",),
    attention="math",
)


def top(of: Case) -> Cause:
    found = diagnose(of).top
    assert found is not None
    return found


def plans(remedy: str, of: Case, now: Conditions = NOW, **fields: Any) -> list[Plan]:
    return list(registry.load("remedies", remedy).plans(of, replace(top(of), **fields), now))


def again(of: Case, *remedies: str) -> Case:
    """The case after earlier incidents of its cause, treated so."""
    told = [{"code": top(of).code, "remedy": r, "step": 9, "conditions": {}} for r in remedies]
    return replace(of, past={**of.past, "incidents": told})


def tried(of: Case, now: Conditions = NOW, policy: str = "auto") -> list[Plan]:
    return candidates(of, diagnose(of), now, policy)


def order(of: Case, policy: str = "auto") -> list[str]:
    return [p.remedy for p in tried(of, policy=policy)]


# ---- the order, by cause ----


@pytest.mark.parametrize(
    ("cause", "auto", "safe"),
    [
        ("nothing_supervised", ["drop_batch", "halt"], ["drop_batch", "halt"]),
        ("forward_overflow", ["fp32_modules", "bf16", "fp32", "halt"], ["fp32_modules", "bf16", "fp32", "halt"]),
        ("backward_overflow", ["scaler_reset", "fp32_modules", "bf16", "fp32", "halt"], None),
        ("half_optimizer", ["adam_eps", "bf16", "fp32", "halt"], ["adam_eps", "bf16", "fp32", "halt"]),
        ("masked_row", ["skip_rows", "drop_batch", "halt"], ["halt"]),
        ("attention_kernel", ["math_attention", "halt"], ["math_attention", "halt"]),
        ("not_reproducible", ["retry", "halt"], ["retry", "halt"]),
        ("bad_weights", ["repair_tensor", "skip_rows", "drop_batch", "halt"], None),
        ("learning_rate", ["lower_lr", "lower_lr", "halt"], ["halt"]),
        (
            "corrupt_state",
            ["repair_tensor", "repair_tensor", "roll_back", "roll_back", "halt"],
            ["repair_tensor", "halt"],
        ),
        ("harmless_outlier", ["let_pass", "skip_rows", "drop_batch", "halt"], ["let_pass", "halt"]),
        ("loss_math", ["skip_rows", "drop_batch", "halt"], ["halt"]),
        ("bad_row", ["skip_rows", "drop_batch", "halt"], ["halt"]),
        ("exploding_gradient", ["clip", "halt"], ["halt"]),
        ("stop_token", ["halt"], ["halt"]),  # silent and named: that nothing fails now proves nothing
    ],
)
def test_each_cause_has_its_own_cures_mildest_first(cause: str, auto: list[str], safe: list[str] | None) -> None:
    found = [r for r in order(OF_CAUSES[cause]) if r != "adaptive_clip"]
    assert found[: len(auto) - 1] + found[-1:] == auto
    if safe is not None:
        assert order(OF_CAUSES[cause], "safe") == safe


@pytest.mark.parametrize("name", OF_CAUSES)
def test_observe_tries_nothing(name: str) -> None:
    assert tried(OF_CAUSES[name], policy="observe") == []


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="'bold' is not one of observe, safe, auto"):
        tried(case(), policy="bold")


def test_an_unknown_cause_gives_the_batch_up_if_the_proof_allows_it() -> None:
    fine = case(evidence=evidence("scan_state known_good_batch", "fp32 rows"))
    assert diagnose(fine).code == "unknown"
    assert order(fine) == ["drop_batch", "halt"]
    assert order(case(evidence=evidence("scan_state", "fp32 rows known_good_batch"))) == ["drop_batch", "halt"]


@pytest.mark.parametrize("trigger", [Trigger.FORECAST, Trigger.SILENT])
def test_a_run_in_which_nothing_failed_is_left_alone_before_it_is_halted(trigger: Trigger) -> None:
    found = tried(case(trigger))
    assert [p.remedy for p in found] == ["let_pass", "halt"]
    assert found[0].conditions == NOW


def test_a_forecast_of_an_overflow_is_answered_by_an_island() -> None:
    of = case(Trigger.FORECAST, FP16, amax={DOWN: 60000.0, f"{DOWN}.input": 9.0, "other": 1.0})
    found = tried(of)
    assert (found[0].remedy, found[0].conditions.fp32_modules) == ("fp32_modules", (DOWN,))


# ---- what every plan must be ----


@settings(deadline=None, max_examples=200)
@given(cases, st.sampled_from([NOW, TIGHT, Conditions(clipper="zclip", precision="fp32")]))
def test_plans_are_sound_whatever_the_evidence(of: Case, now: Conditions) -> None:
    found = candidates(of, diagnose(of), now, "auto")
    assert found[-1].halts
    assert sum(p.halts for p in found) == 1
    keys = [(p.conditions, p.to_step, p.mends, p.fate, p.halts) for p in found]
    assert len(set(keys)) == len(keys)
    for plan in found:
        assert plan.safety is not Safety.ASK
        assert not loosens(plan.conditions, now)
        assert plan.conditions.lr_factor == now.lr_factor or of.good("lower_lr")
        assert plan.conditions.max_lr == now.max_lr or of.good("borne_rate")
        again_ = Plan.from_json(json.loads(json.dumps(plan.to_json())))
        assert (again_.conditions, again_.mends, again_.to_step) == (plan.conditions, plan.mends, plan.to_step)
        said = registry.load("remedies", plan.remedy)
        for words in (said.SAYS, said.ADVICE):
            assert "{" not in words.say(plan.data or {}), (plan.remedy, words)


@settings(deadline=None, max_examples=100)
@given(cases)
def test_safe_gives_up_nothing(of: Case) -> None:
    for plan in candidates(of, diagnose(of), NOW, "safe"):
        assert plan.safety is Safety.SAFE
        assert not set(plan.conditions.quarantine)
        assert plan.to_step is None
        assert plan.fate is not BatchFate.SKIP or of.bad("supervised_tokens") or of.reading.supervised_tokens == 0


@pytest.mark.parametrize(
    ("planned", "now"),
    [
        (Conditions(), Conditions(lr_factor=0.5)),
        (Conditions(), Conditions(max_grad_norm=1.0)),
        (Conditions(max_grad_norm=2.0), Conditions(max_grad_norm=1.0)),
        (Conditions(), Conditions(clipper="zclip")),
        (Conditions(), Conditions(attention="math")),
        (Conditions(adam_eps=1e-6), Conditions(adam_eps=1e-4)),
        (Conditions(precision="bf16"), Conditions(precision="fp32")),
        (Conditions(quarantine=("b",)), Conditions(quarantine=("a",))),
        (Conditions(fp32_modules=("b",)), Conditions(fp32_modules=("a",))),
    ],
)
def test_what_is_in_force_is_not_given_up(planned: Conditions, now: Conditions) -> None:
    assert loosens(planned, now)
    assert not loosens(now, planned) or now.fp32_modules or now.quarantine
    assert not loosens(now, now)


def test_a_plan_that_needs_consent_is_told_and_never_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    module = registry.load("remedies", "bf16")
    monkeypatch.setattr(module, "plans", lambda *_: [Plan("bf16", Safety.ASK, Conditions(precision="bf16"))])
    of = OF_CAUSES["forward_overflow"]
    assert [p.remedy for p in asked(of, diagnose(of), NOW)] == ["bf16"]
    assert "bf16" not in order(of)


def test_a_remedy_that_fails_is_left_out_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.load("remedies", "bf16"), "plans", lambda *_: 1 // 0)
    with pytest.warns(RuntimeWarning, match="the remedy bf16 could not plan"):
        assert "bf16" not in order(OF_CAUSES["forward_overflow"])


# ---- each remedy ----


def test_islands_grow_and_then_make_way_for_another_precision() -> None:
    other = DOWN.replace("11", "12")
    of = replace(
        OF_CAUSES["forward_overflow"],
        reading=replace(OF_CAUSES["forward_overflow"].reading, amax={DOWN: 1.0, f"{other}": 2.0}),
    )
    first, second = plans("fp32_modules", of)
    assert (first.conditions.fp32_modules, first.temporary) == ((DOWN,), True)
    assert second.conditions.fp32_modules == (DOWN, other)
    once = plans("fp32_modules", again(of, "fp32_modules"), Conditions(fp32_modules=(DOWN,)))
    assert [(p.conditions.fp32_modules, p.temporary) for p in once] == [((DOWN, other), False)]
    assert plans("fp32_modules", again(of, "fp32_modules", "fp32_modules")) == []
    assert plans("fp32_modules", of, Conditions(precision="bf16")) == []
    relapsed = again(of, "fp32_modules", "fp32_modules")
    assert [p.remedy for p in tried(relapsed)] == ["bf16", "fp32", "halt"]


def test_a_precision_that_was_no_cure_or_is_in_force_is_not_proposed() -> None:
    of = OF_CAUSES["forward_overflow"]
    assert plans("bf16", replace(of, evidence=evidence("fp32", "bf16"))) == []
    assert plans("bf16", of, Conditions(precision="bf16")) == plans("fp32", of, Conditions(precision="fp32")) == []
    assert [p.conditions.precision for p in plans("fp32", of, Conditions(precision="bf16"))] == ["fp32"]
    assert [p.temporary for p in plans("fp32", OF_CAUSES["half_optimizer"])] == [False]
    assert plans("fp32", OF_CAUSES["bad_row"]) == []


def test_the_rows_are_quarantined_by_content() -> None:
    (plan,) = plans("skip_rows", OF_CAUSES["bad_row"], Conditions(quarantine=("ffff",)))
    assert plan.conditions.quarantine == ("ffff", "0123456789ab")
    assert (plan.fate, plan.data["count"]) == (BatchFate.RETRY, 1)
    assert plans("skip_rows", OF_CAUSES["bad_row"], Conditions(quarantine=("0123456789ab",))) == []


@pytest.mark.parametrize("numbers", [{"rest_good": False}, {"num_bad": 4}, {"rows": ["no row id"]}, {"rows": None}])
def test_rows_are_left_alone_where_the_rest_is_bad_or_nothing_would_be_left(numbers: dict[str, Any]) -> None:
    of = case(evidence=evidence("scan_state rows", "", rows=row_found(**numbers)))
    assert plans("skip_rows", of) == []


def test_a_lower_rate_needs_its_proof_and_goes_further_back_at_each_relapse() -> None:
    of = OF_CAUSES["learning_rate"]
    course = {**COURSE, "factor": 0.03, "warmup_from_update": 121, "warmup_steps": 3}
    proved = replace(of, evidence=of.evidence | evidence("lower_lr", lower_lr=course))
    found = plans("lower_lr", proved)
    tried = [(pytest.approx(0.03), 121), (pytest.approx(0.01), 121), (pytest.approx(0.01), 113)]
    assert [(p.conditions.lr_factor, p.to_step) for p in found] == tried
    assert (found[0].conditions.warmup_from_update, found[0].conditions.warmup_steps) == (121, 3)
    assert found[2].conditions.warmup_from_update == 113, "that much earlier, as it goes further back"
    assert [p.to_step for p in plans("lower_lr", again(proved, "lower_lr"))] == [121, 121, 113]
    assert [p.to_step for p in plans("lower_lr", again(proved, "lower_lr", "lower_lr"))] == [113]
    scaled = plans("lower_lr", proved, Conditions(lr_factor=0.5))
    assert scaled[0].conditions.lr_factor == pytest.approx(0.015), "of the rate in force"
    assert plans("lower_lr", of)[0].conditions.warmup_from_update is None, "the schedule is warming up by itself"
    assert list(registry.load("remedies", "lower_lr").plans(case(), top(of), NOW)) == []


def test_a_softmax_over_nothing_is_cured_without_giving_up_rows() -> None:
    of = OF_CAUSES["masked_row"]
    assert plans("safe_softmax", of) == [], "not without its experiment"
    proved = replace(of, evidence=of.evidence | evidence("safe_softmax"), facts={**of.facts, "attention": "eager"})
    first = candidates(proved, diagnose(proved), NOW, "safe")[0]
    assert (first.remedy, first.safety, first.conditions.attention) == ("safe_softmax", Safety.SAFE, "sdpa")
    assert plans("safe_softmax", proved, Conditions(attention="math")) == []


RAISED = {"start_step": 121, "max_lr": 1e-4, "limit": 1e-4, "was": 0.1, "losses": [2.4], "losses_same": [9.0]}


def test_where_the_rate_was_raised_the_rate_of_before_is_the_limit_then_half_of_it() -> None:
    of = case(Trigger.RUNAWAY, loss=9.0, evidence=evidence("scan_state borne_rate", "", borne_rate=RAISED))
    found = plans("lower_lr", of)
    assert [(p.conditions.max_lr, p.to_step) for p in found] == [(1e-4, 121), (5e-5, 121)]
    assert all(p.conditions.lr_factor == 1.0 and p.conditions.warmup_from_update is None for p in found)
    assert "1e-4" in registry.load("remedies", "lower_lr").SAYS.say(found[0].data or {}).replace("0.0001", "1e-4")
    assert plans("lower_lr", of, Conditions(max_lr=1e-5))[0].conditions.max_lr == 1e-4, "left to the rule below"
    assert loosens(found[0].conditions, Conditions(max_lr=1e-5))
    assert loosens(Conditions(), Conditions(max_lr=1e-5))
    assert not loosens(Conditions(max_lr=1e-5), Conditions(max_lr=1e-4))


def test_an_update_at_a_raised_rate_that_was_undone_needs_no_way_back() -> None:
    now = {**RAISED, "start_step": case(Trigger.UPDATE).reading.step - 1}
    of = case(Trigger.UPDATE, evidence=evidence("scan_state borne_rate", "", borne_rate=now))
    assert [p.to_step for p in plans("lower_lr", of)] == [None, None]


def test_clipping_starts_where_the_experiment_did_and_tightens_at_a_relapse() -> None:
    of = OF_CAUSES["exploding_gradient"]
    assert [(p.conditions.max_grad_norm, p.to_step) for p in plans("clip", of)] == [(0.5, 121)]
    assert plans("clip", of, Conditions(max_grad_norm=0.4)) == []
    assert [p.conditions.max_grad_norm for p in plans("clip", again(of, "clip"), Conditions(max_grad_norm=0.4))] == [
        0.2
    ]


def test_an_outlier_is_clipped_without_going_back() -> None:
    loud = Finding("NUM011", Severity.WARNING, "", {"grad_norm": 90.0, "limit": 5.0})
    of = case(Trigger.OUTLIER, grad_norm=90.0, finding=loud, evidence=evidence("scan_state", "let_pass"))
    (plan,) = plans("clip", of)
    assert (plan.conditions.max_grad_norm, plan.to_step) == (1.0, None)


def test_clippers_come_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    real = registry.names
    ladder = ("adagc", "autoclip", "zclip")
    monkeypatch.setattr(registry, "names", lambda family: ladder if family == "clippers" else real(family))
    of = OF_CAUSES["exploding_gradient"]
    found = [plans("adaptive_clip", of, Conditions(clipper=c)) for c in (None, "zclip", "autoclip", "adagc", "theirs")]
    assert [[p.conditions.clipper for p in f] for f in found] == [["zclip"], ["autoclip"], ["adagc"], [], []]
    assert found[0][0].to_step == 121


def test_a_tensor_comes_back_from_the_newest_good_state_and_a_frozen_one_from_the_model() -> None:
    first, second = plans("repair_tensor", OF_CAUSES["corrupt_state"])
    assert [(m.what, m.from_step) for m in first.mends] == [(Operation.REPAIR, 119)]
    assert (first.safety, second.safety, second.mends[0].from_step) == (Safety.SAFE, Safety.LOSSY, None)
    frozen = bad_before("parameter", "base.weight", None, frozen=True, since_exact=False)
    of = case(suspects=(frozen,), evidence=evidence("", "scan_state known_good_batch"))
    assert [(p.safety, p.mends[0].from_step) for p in plans("repair_tensor", of)] == [(Safety.SAFE, None)]


def test_a_moment_is_repaired_or_reset() -> None:
    moment = bad_before("moment", "w|exp_avg", 41)
    of = case(Trigger.UPDATE, suspects=(moment, SPOILT), evidence=evidence("fresh_moments", "scan_state"))
    assert [(p.mends[0].names, p.mends[0].from_step) for p in plans("repair_tensor", of)] == [(("w|exp_avg",), 40)]
    (reset,) = plans("reset_moments", of)
    assert (reset.mends[0].what, reset.mends[0].names) == (Operation.RESET_MOMENTS, ("w",))
    unknown = replace(of, suspects=(bad_before("moment", "w|exp_avg", None),))
    assert plans("repair_tensor", unknown) == []
    told = replace(of, evidence=of.evidence | evidence("fresh_moments", fresh_moments={"only": ["a", "b"]}))
    assert plans("reset_moments", told)[0].mends[0].names == ("a", "b")


def test_rollbacks_go_further_and_further() -> None:
    of = case(
        suspects=(), evidence=evidence("older_weights fresh_moments", "", older_weights={"good": [121, 128, 100]})
    )
    of = replace(of, trigger=Trigger.UPDATE)
    assert [p.to_step for p in plans("roll_back", of)] == [128, 121, 100]
    assert [p.to_step for p in plans("roll_back", again(of, "roll_back"))] == [121, 100]
    assert plans("roll_back", of)[0].data["steps"] == 1


def test_a_larger_eps_only_where_it_is_larger() -> None:
    of = OF_CAUSES["half_optimizer"]
    assert [p.conditions.adam_eps for p in plans("adam_eps", of)] == [1e-4]
    assert plans("adam_eps", of, Conditions(adam_eps=1e-3)) == []
    assert plans("adam_eps", replace(of, evidence=evidence("fp32", "adam_eps"))) == []


def test_plain_attention_only_where_it_is_not_in_use() -> None:
    of = OF_CAUSES["attention_kernel"]
    assert [p.conditions.attention for p in plans("math_attention", of)] == ["math"]
    assert plans("math_attention", replace(of, facts={**FP32, "attention": "eager"})) == []
    assert plans("math_attention", of, Conditions(attention="math")) == []


def test_only_what_does_not_repeat_is_just_tried_again() -> None:
    of = OF_CAUSES["not_reproducible"]
    assert plans("retry", of)[0].conditions == NOW
    cause = top(of)
    assert list(registry.load("remedies", "retry").plans(replace(of, verdict=Verdict.REPRODUCED), cause, NOW)) == []


def test_an_outlier_that_harms_is_not_let_pass() -> None:
    of = OF_CAUSES["harmless_outlier"]
    assert plans("let_pass", of)[0].fate is BatchFate.PASS
    assert plans("let_pass", replace(of, evidence=of.evidence | evidence("", "let_pass"))) == []


def test_without_any_cause_there_is_the_halt_after_the_batch_was_given_up_in_vain() -> None:
    found = candidates(case(), Diagnosis(), NOW, "auto")
    assert [p.remedy for p in found] == ["drop_batch", "halt"]
    assert found[1].data == {"step": 130}


def test_half_weights_are_not_given_back() -> None:
    of = case(facts=PURE, evidence=evidence("fp32 bf16", **WIDE))
    assert [p.temporary for p in plans("bf16", of)] == [False]
    assert ROW not in str(plans("bf16", of))


def test_a_lower_rate_that_was_tried_in_vain_is_not_planned() -> None:
    of = case(evidence=evidence("", "lower_lr", lower_lr=COURSE))
    assert list(registry.load("remedies", "lower_lr").plans(of, top(OF_CAUSES["learning_rate"]), NOW)) == []


def test_a_plan_of_a_third_party_that_loosens_something_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    loose = Plan("bf16", Safety.SAFE, Conditions(precision="bf16"))
    monkeypatch.setattr(registry.load("remedies", "bf16"), "plans", lambda *_: [loose])
    of = OF_CAUSES["forward_overflow"]
    assert "bf16" in [p.remedy for p in tried(of)]
    assert "bf16" not in [p.remedy for p in tried(of, Conditions(lr_factor=0.1))]
