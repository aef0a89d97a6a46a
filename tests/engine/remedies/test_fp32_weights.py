"""fp16 weights under a loss scaler become fp32; at any other failure this remedy has nothing to offer."""

from __future__ import annotations

from dataclasses import replace

from engine.causes.scenes import OF_CAUSES, PURE
from finitune.core.incident import Safety, Trigger
from finitune.engine.case import Case
from finitune.engine.codes_half import HALF_UNDER_SCALER
from finitune.engine.conditions import AS_CONFIGURED
from finitune.engine.diagnose import diagnose
from finitune.engine.remedies import adam_eps, fp32_weights

SCENE = OF_CAUSES["half_optimizer"]


def refused() -> Case:
    finding = HALF_UNDER_SCALER.find("a.lora_A.weight", count=3, total=4, first="a.lora_A.weight")
    return Case(Trigger.UPDATE, finding, SCENE.reading, {**SCENE.facts, **PURE})


def test_a_scaler_that_refuses_names_the_cause_and_the_first_remedy() -> None:
    case = refused()
    found = diagnose(case)
    assert (found.code, found.causes[0].where) == ("OPT400", "a.lora_A.weight")
    (plan,) = fp32_weights.plans(case, found.causes[0], AS_CONFIGURED)
    assert (plan.remedy, plan.safety, plan.conditions) == ("fp32_weights", Safety.SAFE, AS_CONFIGURED)
    assert "3" in fp32_weights.SAYS.say(plan.data or {})


def test_a_run_in_progress_or_without_fp16_weights_is_none_of_its() -> None:
    case = refused()
    (cause,) = [c for c in diagnose(case).causes if c.name == "half_optimizer"]
    assert not list(fp32_weights.plans(SCENE, cause, AS_CONFIGURED))
    full = replace(case, facts={**case.facts, "weights": ["float32"]})
    assert not list(fp32_weights.plans(full, cause, AS_CONFIGURED))


def test_an_eps_that_is_a_pair_is_no_eps_of_an_adam() -> None:
    cause = diagnose(SCENE).causes[0]
    assert list(adam_eps.plans(SCENE, cause, AS_CONFIGURED))
    for pair in ((1e-30, 1e-3), [None, 1e-3]):
        adafactor = replace(SCENE, facts={**SCENE.facts, "optimizer": "adafactor", "adam_eps": pair})
        assert not list(adam_eps.plans(adafactor, cause, AS_CONFIGURED))
