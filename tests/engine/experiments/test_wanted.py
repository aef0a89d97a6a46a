"""Which experiments are wanted in which case: nothing is computed here."""

from __future__ import annotations

import math
from typing import Any

import pytest

from finitune.core import registry
from finitune.core.incident import Evidence, Result, Suspect, Trigger
from finitune.core.types import Finding, Reading, Severity
from finitune.engine.case import Case
from finitune.engine.experimenting import in_order
from finitune.engine.experiments._course import jumped, num_risen, ran_away

MINE = {
    *("supervised_tokens", "adam_eps", "fresh_moments", "known_good_batch", "fp32", "bf16", "loss_scales"),
    *("update_share", "let_pass", "math_attention", "padding", "reference_optimizer", "older_weights", "islands"),
    *("lower_lr", "tighter_clip"),
}
FP16 = {"precision": "fp16", "weights": ["float32"], "optimizer": "AdamW", "adam_eps": 1e-8, "attention": "sdpa"}
FP32 = {**FP16, "precision": "fp32"}
PURE = {**FP16, "weights": ["float16"]}
SGD = {**FP32, "optimizer": "SGD"}
CALM = [3.0, 3.1, 2.9, 3.0, 3.1, 3.0, 2.9, 3.0, 3.1, 3.0]
RISE = [*CALM, 5.0, 9.0, 20.0, 80.0]
IN_ATTENTION = Suspect("module", "model.layers.0.self_attn", {})
IN_MLP = Suspect("module", "model.layers.0.mlp.down_proj", {})


def case_of(
    trigger: Trigger,
    facts: dict[str, Any],
    good: tuple[str, ...] = (),
    bad: tuple[str, ...] = (),
    *suspects: Suspect,
    losses: list[float] | None = None,
    scale: float | None = None,
    data: dict[str, Any] | None = None,
) -> Case:
    loss = math.nan if trigger is Trigger.LOSS else 3.0
    norm = math.nan if trigger in (Trigger.LOSS, Trigger.GRADIENT, Trigger.SCALE) else 1.0
    found = {n: Evidence(n, r) for names, r in ((good, Result.GOOD), (bad, Result.BAD)) for n in names}
    past = {"recent_losses": CALM if losses is None else losses, "median_grad_norm": 1.0}
    finding = Finding("NUM001", Severity.ERROR, data=data or {})
    return Case(trigger, finding, Reading(9, loss, norm, loss_scale=scale), facts, past, None, suspects, found)


def wanted(case: Case) -> set[str]:
    made = set(case.evidence)
    return {n for n, m in in_order() if n in MINE and n not in made and m.wanted(case)}


BASE = {"supervised_tokens", "known_good_batch"}


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (case_of(Trigger.LOSS, FP32), BASE),
        (case_of(Trigger.LOSS, FP16), BASE | {"fp32", "bf16"}),
        (case_of(Trigger.LOSS, {**FP16, "precision": "bf16"}), BASE | {"fp32"}),
        (case_of(Trigger.GRADIENT, FP32, (), (), IN_MLP), BASE),
        (case_of(Trigger.GRADIENT, FP32), BASE | {"math_attention", "padding"}),
        (case_of(Trigger.LOSS, FP32, (), (), IN_ATTENTION), BASE | {"math_attention", "padding"}),
        (case_of(Trigger.GRADIENT, {**FP32, "attention": "eager"}), BASE | {"padding"}),
        (
            case_of(Trigger.GRADIENT, FP16, (), (), IN_MLP, scale=2.0**16),
            BASE | {"fp32", "bf16", "loss_scales"},
        ),
        (case_of(Trigger.SCALE, FP16, ("fp32",), (), IN_MLP, scale=2.0**8), BASE | {"bf16", "loss_scales", "islands"}),
        (
            case_of(Trigger.LOSS, FP16, ("fp32",), ("known_good_batch",), scale=1.0),
            {"supervised_tokens", "bf16", "islands"},
        ),
        (case_of(Trigger.LOSS, FP16, ("known_good_batch",), ("fp32",)), {"supervised_tokens"}),
        (
            case_of(Trigger.LOSS, FP32, (), ("known_good_batch",)),
            {"supervised_tokens", "older_weights", "lower_lr", "reference_optimizer"},
        ),
        (
            case_of(Trigger.LOSS, FP32, (), ("known_good_batch", "older_weights")),
            {"supervised_tokens", "reference_optimizer"},
        ),
        (case_of(Trigger.LOSS, PURE, (), ("known_good_batch", "older_weights", "fp32", "bf16")), {"supervised_tokens"}),
        (case_of(Trigger.LOSS, FP32, (), ("known_good_batch", "scan_state")), {"supervised_tokens"}),
        (case_of(Trigger.LOSS, FP32, ("rows", "known_good_batch"), ()), {"supervised_tokens"}),
        (case_of(Trigger.LOSS, FP16, ("fp32",), (), losses=RISE), BASE | {"bf16", "islands", "lower_lr"}),
        (case_of(Trigger.RUNAWAY, FP32), {"supervised_tokens", "lower_lr", "update_share", "reference_optimizer"}),
        (case_of(Trigger.RUNAWAY, FP32, ("lower_lr",), ("update_share", "reference_optimizer")), {"supervised_tokens"}),
        (
            case_of(Trigger.RUNAWAY, FP32, (), ("lower_lr", "update_share", "reference_optimizer")),
            {"supervised_tokens", "tighter_clip"},
        ),
        (
            case_of(Trigger.OUTLIER, SGD, (), ("known_good_batch",), data={"grad_norm": 50.0, "limit": 5.0}),
            {"supervised_tokens", "older_weights", "lower_lr", "tighter_clip", "update_share", "reference_optimizer"},
        ),
        (case_of(Trigger.OUTLIER, FP32, ("known_good_batch",), ()), {"supervised_tokens", "let_pass", "update_share"}),
        (case_of(Trigger.SILENT, FP32), {"supervised_tokens", "update_share", "reference_optimizer"}),
        (case_of(Trigger.FORECAST, FP16), set()),
        (
            case_of(Trigger.UPDATE, PURE),
            BASE | {"adam_eps", "fresh_moments", "fp32", "bf16", "update_share", "reference_optimizer"},
        ),
        (case_of(Trigger.UPDATE, PURE, ("adam_eps",), ()), {"supervised_tokens", "fresh_moments"}),
        (
            case_of(Trigger.UPDATE, {**PURE, "adam_eps": 1e-4}, ("fresh_moments",), ("update_share",)),
            {"supervised_tokens", "reference_optimizer"},
        ),
        (case_of(Trigger.UPDATE, FP32, (), ("scan_state",)), {"supervised_tokens", "fresh_moments"}),
    ],
)
def test_only_what_can_still_tell_something_is_wanted(case: Case, expected: set[str]) -> None:
    assert wanted(case) == expected


LEAP = [*CALM, 90.0, 95.0]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (case_of(Trigger.LOSS, FP32), False),
        (case_of(Trigger.LOSS, FP32, (), ("known_good_batch",)), True),
        (case_of(Trigger.LOSS, FP16, ("fp32",), ("known_good_batch",)), False),
        (case_of(Trigger.LOSS, FP32, (), ("known_good_batch", "scan_state")), False),
        (case_of(Trigger.LOSS, FP32, (), ("known_good_batch",), losses=[*CALM, 4.8, 7.0, 11.0, 17.0]), False),
        (case_of(Trigger.LOSS, FP32, (), ("known_good_batch",), losses=[*LEAP, 99.0]), True),
        (case_of(Trigger.RUNAWAY, FP32, losses=RISE), False),
        (case_of(Trigger.RUNAWAY, FP32, losses=LEAP), True),
        (case_of(Trigger.UPDATE, FP32), False),
        (case_of(Trigger.FORECAST, FP16), False),
    ],
)
def test_the_state_is_computed_again_where_it_changed_at_once_and_nothing_explains_it(
    case: Case, expected: bool
) -> None:
    assert registry.load("experiments", "redone_state").wanted(case) is expected


def test_nothing_else_is_wanted_where_nothing_is_supervised_and_no_gradient_is_spoilt() -> None:
    from dataclasses import replace

    case = case_of(Trigger.LOSS, FP16, (), ("supervised_tokens",))
    assert wanted(replace(case, reading=Reading(9, math.nan, 0.0))) == set()
    assert "fp32" in wanted(case), "a spoilt gradient has another reason"


@pytest.mark.parametrize(
    ("losses", "risen", "away", "leapt"),
    [
        (CALM, 0, False, False),
        (RISE, 4, True, False),
        ([*CALM, 400.0, 500.0, 300.0], 3, True, True),
        ([], 0, False, False),
        ([2.5, 4.9, 2.1, 3.0, 4.8, 2.2, 4.9], 1, False, False),
        ([9.0, 7.0, 5.0, 4.0, 3.2, 3.0, 2.9], 0, False, False),
    ],
)
def test_a_rise_is_told_from_noise_and_a_leap_from_a_climb(
    losses: list[float], risen: int, away: bool, leapt: bool
) -> None:
    case = case_of(Trigger.GRADIENT, FP32, losses=losses)
    assert (num_risen(losses), ran_away(case), jumped(case)) == (risen, away, leapt)


def test_every_experiment_of_the_contract_is_registered() -> None:
    assert set(registry.names("experiments")) >= MINE | {"scan_state", "rows"}


@pytest.mark.parametrize(("eps", "is_one"), [(1e-8, True), (None, True), (1e-3, False), ((1e-30, 1e-3), False)])
def test_an_eps_that_is_large_or_a_pair_is_not_tried(eps: Any, is_one: bool) -> None:
    case = case_of(Trigger.UPDATE, {**PURE, "adam_eps": eps})
    assert ("adam_eps" in wanted(case)) is is_one
