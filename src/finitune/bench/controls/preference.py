"""Preference optimisation (DPO and ORPO): a loss that starts at ln 2 and falls towards zero."""

from __future__ import annotations

from random import Random

from finitune.bench.workload import Workload

RUNS = (("dpo", "fp32"), ("orpo", "fp32"), ("dpo", "bf16"))
STEPS = 400


def plant(load: Workload, random: Random) -> str:  # noqa: ARG001
    """Nothing is changed."""
    return "nothing"
