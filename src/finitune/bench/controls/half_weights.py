"""Weights, gradients and moments in bf16, at a rate that they can bear."""

from __future__ import annotations

from random import Random

from finitune.bench.workload import Workload

RUNS = (("half_weights", "bf16"),)
STEPS = 500


def plant(load: Workload, random: Random) -> str:  # noqa: ARG001
    """Nothing is changed."""
    return "nothing"
