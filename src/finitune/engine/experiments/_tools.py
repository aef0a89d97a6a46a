"""What several experiments share: signs that decide whether one is wanted, and the change of a single condition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from finitune.core.incident import Evidence, Result, Suspect, Trigger
from finitune.engine.case import Case
from finitune.engine.causes import _signs as signs
from finitune.engine.conditions import NotPossible
from finitune.engine.lab import Lab, Shot
from finitune.engine.replay import numbers_of

STEP_FAILS = (Trigger.LOSS, Trigger.GRADIENT, Trigger.SCALE, Trigger.OUTLIER)
"""The step itself shows the failure, before any update: one computation of it tells good from bad."""
_HALF = ("float16", "bfloat16")

Findings = tuple[Evidence, tuple[Suspect, ...]]
"""What an experiment gives."""


def evidence(name: str, good: bool, /, **numbers: Any) -> Evidence:
    """Evidence of an experiment that was made."""
    return Evidence(name, Result.GOOD if good else Result.BAD, numbers)


def flip(lab: Lab, name: str, **changes: Any) -> Findings:
    """The failing step once, with these conditions changed. Raises NotPossible, BudgetSpent."""
    conditions = replace(lab.now, **changes)
    if conditions == lab.now:
        raise NotPossible(f"{', '.join(changes)} is so already")
    shot = lab.shoot(conditions)
    return evidence(name, not shot.bad, **numbers(shot)), ()


def numbers(shot: Shot) -> dict[str, Any]:
    """Loss and gradient norm of a shot, and what its update spoilt, where it made one."""
    found: dict[str, Any] = dict(numbers_of(shot.reading))
    return found | ({"state_bad": list(shot.bad_state[:8])} if shot.bad_state else {})


# -- signs for `wanted` ---------------------------------------------------------------------------------------------


def is_settled(case: Case) -> bool:
    """Nothing is supervised in the step and no gradient is spoilt: no condition can change what that means."""
    return case.bad("supervised_tokens") and math.isfinite(case.reading.grad_norm)


def fails_in_step(case: Case) -> bool:
    """One computation of the step shows the failure, and there is still something to find out about it."""
    return case.trigger in STEP_FAILS and not is_settled(case)


def update_unexplained(case: Case) -> bool:
    """The update spoils the state, and neither eps nor moments nor the state of before were shown to be the reason."""
    explained = case.good("adam_eps") or case.good("fresh_moments") or case.bad("scan_state")
    return case.trigger is Trigger.UPDATE and not explained


def products_are_half(case: Case) -> bool:
    """Products are computed in a half precision, fp16 or bf16."""
    return str(case.facts.get("precision", "")).startswith(("fp16", "bf16"))


def is_half(case: Case) -> bool:
    """Products or trainable weights are in a half precision."""
    return products_are_half(case) or any(w in _HALF for w in case.facts.get("weights", ()))


def is_fp16(case: Case) -> bool:
    """Products or trainable weights are in fp16, whose range ends at 65504."""
    return case.is_half or case.has_half_weights


def precision_explains(case: Case) -> bool:
    """Another precision or loss scale makes the failure go away."""
    return signs.precision_cures(case) or case.good("loss_scales")


def is_elsewhere(case: Case) -> bool:
    """Something that is neither the rate nor the course of training was shown to be at fault."""
    shown = any(case.good(name) for name in ("rows", "math_attention", "padding", "let_pass", "known_good_batch"))
    return shown or case.bad("scan_state")


def may_be_attention(case: Case) -> bool:
    """The failure was localised in attention, or it is one of the backward pass that could not be localised."""
    if signs.op(case) or signs.module(case):
        return signs.in_attention(case)
    return case.trigger in (Trigger.GRADIENT, Trigger.SCALE)


def is_adam(case: Case) -> bool:
    """The optimizer divides by a root of squared gradients, so that clipping hardly changes its steps."""
    return "adam" in str(case.facts.get("optimizer", "")).lower()


def finite(values: Sequence[Any]) -> list[float]:
    """The finite numbers among ``values``."""
    return [n for v in values if (n := signs.number(v)) is not None]
