"""A policy gradient on answers that the policy gives itself, sampled anew every few steps; rewards are shares."""

from __future__ import annotations

from random import Random

from finitune.bench.workload import Workload

RUNS = (("roll_outs", "fp32"), ("roll_outs", "bf16"))
STEPS = 160


def plant(load: Workload, random: Random) -> str:  # noqa: ARG001
    """Nothing is changed."""
    return "nothing"
