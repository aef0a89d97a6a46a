"""A policy gradient: the loss is noise around zero, of either sign."""

from __future__ import annotations

from random import Random

from finitune.bench.workload import Workload

RUNS = (("policy_gradient", "fp32"), ("policy_gradient", "bf16"))
STEPS = 400


def plant(load: Workload, random: Random) -> str:  # noqa: ARG001
    """Nothing is changed."""
    return "nothing"
